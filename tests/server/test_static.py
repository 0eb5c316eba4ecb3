"""The files of the API page."""

from tests.support.service import serve

FILE = "/static-offline-docs/swagger-ui.css"


def test_a_file_is_sent_once_to_who_keeps_it() -> None:
    with serve() as client:
        first = client.get(FILE)
        assert first.status_code == 200
        assert first.headers["content-type"].startswith("text/css")
        assert len(first.content) == int(first.headers["content-length"]) > 100_000
        again = client.get(FILE, headers={"If-None-Match": first.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert client.get(FILE, headers={"If-None-Match": '"other"'}).content == first.content
        head = client.head(FILE)
        assert head.headers["content-length"] == first.headers["content-length"]
        assert head.content == b""


def test_only_files_of_the_directory_are_sent() -> None:
    with serve() as client:
        for path in "x", "", "x/swagger-ui.css", "../static/x", "%2e%2e/core.py", "%00":
            assert client.get(f"/static-offline-docs/{path}").status_code == 404, path
        refused = client.post(FILE)
        assert refused.status_code == 405
        assert refused.headers["allow"] == "GET, HEAD"
