"use strict";

// What the service knows: the longest a check takes (seconds), how many ports one request may have,
// and a sentence for each result: those for errors by how these begin.
const { advice, reachable, validCertificate, longestCheck, maxPorts } = JSON.parse(
  find("page-data").textContent,
);

// The page may stand under any path: all that it asks for is beside it.
const url = new URL(".", location.href).href.replace(/\/$/, "");
// A link may lead here by a path or a name of its author's choice, and people paste what they copy into
// a shell. So it holds nothing that a shell would take apart.
const here = /^[A-Za-z0-9._~/:[\]-]+$/.test(url) ? url : null;

const portsField = find("ports");
const httpsPortField = find("https-port");
const table = document.querySelector("#results table");
let isChecking = false;
let resultsAsText = "";

find("check").addEventListener("submit", (event) => {
  event.preventDefault();
  check(portsField, parsePorts, checkPorts);
});
find("check-certificate").addEventListener("submit", (event) => {
  event.preventDefault();
  check(httpsPortField, parsePort, checkCertificate);
});
portsField.addEventListener("input", () => {
  showFault(portsField, "");
  showCommand();
});
httpsPortField.addEventListener("input", () => showFault(httpsPortField, ""));
find("copy-results").addEventListener("click", (event) => copy(resultsAsText, event.target));
find("copy-command").addEventListener("click", (event) => copy(find("command").textContent, event.target));
find("copy-command").hidden = !here;
showCommand();
findAddress().catch((error) => say(error.message, "failed"));

/** Read a field with `parse`, and have `run` check what it says, at the visitor's address. */
async function check(field, parse, run) {
  if (isChecking) return;
  let asked;
  try {
    asked = parse(field.value);
  } catch (error) {
    showFault(field, error.message);
    field.focus();
    return;
  }
  for (const each of [portsField, httpsPortField]) showFault(each, "");
  find("results").hidden = true;
  for (const note of document.querySelectorAll(".actions [role=status]")) note.textContent = "";
  setChecking(true);
  const progress = showProgress();
  try {
    // Asked again, since a browser can move to another network while a page is open.
    await run(await findAddress(), asked);
  } catch (error) {
    say(error.message, "failed");
  } finally {
    clearInterval(progress);
    find("progress").hidden = true;
    setChecking(false);
  }
}

async function checkPorts(address, ports) {
  sayChecking(`${count(ports.length)} of ${address}`);
  const { results } = await post("check-ports", { provider_ip: address, ports });
  const groups = new Map();
  for (const [port, { error }] of Object.entries(results)) {
    groups.set(error, [...(groups.get(error) ?? []), Number(port)]);
  }
  const rows = [...groups].map(([error, group]) => ({
    ports: formatPorts(group),
    isGood: !error,
    verdict: error ?? "Reachable",
    sentence: error ? adviceFor(error, address) : reachable,
  }));
  const summary = `${groups.get(null)?.length ?? 0} of ${count(ports.length)} can be reached.`;
  showResults(`Ports of ${address}`, rows, summary);
}

async function checkCertificate(address, port) {
  sayChecking(`the certificate on port ${port} of ${address}`);
  const asked = { host: address, port, expected_ip: address };
  const { valid, error, not_after: until } = await post("check-tls", asked);
  const row = valid
    ? { verdict: `Valid until ${formatTime(until)}`, sentence: validCertificate }
    : { verdict: error, sentence: adviceFor(error, address) };
  const summary = `Port ${port} has ${valid ? "a" : "no"} valid certificate.`;
  showResults(`Certificate at ${address}`, [{ ports: port, isGood: valid, ...row }], summary);
}

function post(path, body) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body) });
}

/** Ask the service; an Error's message says what went wrong, in words for people. */
async function ask(path, options) {
  let response, answer;
  try {
    const signal = AbortSignal.timeout((longestCheck + 30) * 1000);
    response = await fetch(path, { cache: "no-store", signal, ...options });
    answer = await response.json();
  } catch {
    if (!response) throw new Error("The service cannot be reached. See whether you are online, and try again.");
  }
  if (response.ok && answer) return answer;
  if (answer?.detail?.message) throw new Error(answer.detail.message);
  const wait = response.headers.get("Retry-After");
  throw new Error(
    `The service did not answer as it should (HTTP status ${response.status}). ` +
      (wait ? `Try again in ${wait} s.` : "Try again later."),
  );
}

/** Show the visitor's address as the service sees it, and return it. */
async function findAddress() {
  const { ip } = await ask("ip");
  find("address").textContent = ip ?? "unknown";
  find("family").textContent = !ip ? "" : ip.includes(":") ? "(IPv6)" : "(IPv4)";
  if (!ip) throw new Error("The service does not see your address, so it cannot check it from here.");
  return ip;
}

/** Return the ports of a text like "7466, 50800-50899", each once. */
function parsePorts(text) {
  const ports = new Set();
  for (const word of text.replace(/\s*[-–]\s*/g, "-").split(/[\s,;]+/).filter(Boolean)) {
    const match = /^(\d{1,5})(?:-(\d{1,5}))?$/.exec(word);
    const low = Number(match?.[1]);
    const high = Number(match?.[2] ?? match?.[1]);
    if (!(1 <= low && low <= high && high <= 65535)) {
      throw new Error(`“${word}” is neither a port (1 to 65535) nor a range such as 50800-50899.`);
    }
    for (let port = low; port <= high; port++) ports.add(port);
  }
  if (!ports.size) throw new Error("Enter at least one port.");
  if (ports.size > maxPorts) {
    throw new Error(`${ports.size} ports are too many for one check. Enter at most ${maxPorts}.`);
  }
  return [...ports];
}

function parsePort(text) {
  const port = /^\s*\d{1,5}\s*$/.test(text) ? Number(text) : 0;
  if (!(1 <= port && port <= 65535)) throw new Error("Enter one port (1 to 65535), such as 443.");
  return port;
}

/** Write ports like "7466, 50800-50899". */
function formatPorts(ports) {
  const runs = [];
  for (const port of [...ports].sort((a, b) => a - b)) {
    if (runs.at(-1)?.[1] === port - 1) runs.at(-1)[1] = port;
    else runs.push([port, port]);
  }
  return runs.map(([low, high]) => (low === high ? low : `${low}-${high}`)).join(", ");
}

/** Write a time of the service's in the visitor's words and time zone. */
function formatTime(text) {
  return new Date(text).toLocaleString(undefined, { dateStyle: "long", timeStyle: "long" });
}

function adviceFor(error, address) {
  return Object.entries(advice).find(([words]) => error.startsWith(words))[1].replace("{ip}", address);
}

function showResults(what, rows, summary) {
  const caption = `${what}, checked ${new Date().toLocaleString()} by ${here ?? "this service"}`;
  const lines = [];
  table.caption.textContent = caption;
  table.tBodies[0].replaceChildren();
  for (const { ports, isGood, verdict, sentence } of rows) {
    const sign = element("span", { class: "sign", "aria-hidden": "true" }, isGood ? "✓" : "✕");
    table.tBodies[0].append(
      element(
        "tr",
        { role: "row", class: isGood ? "good" : "bad" },
        element("th", { role: "rowheader", scope: "row" }, ports),
        element(
          "td",
          { role: "cell" },
          element("p", { class: "verdict" }, sign, verdict),
          element("p", {}, sentence),
        ),
      ),
    );
    lines.push(`${ports}: ${verdict}. ${sentence}`);
  }
  resultsAsText = [caption, ...lines, summary, ""].join("\n");
  find("results").hidden = false;
  say(summary);
}

function showProgress() {
  const bar = document.querySelector("progress");
  const started = performance.now();
  bar.max = longestCheck;
  bar.value = 0;
  find("progress").hidden = false;
  return setInterval(() => (bar.value = (performance.now() - started) / 1000), 100);
}

function setChecking(value) {
  isChecking = value;
  // Not disabled, which would take the keyboard's focus away.
  for (const button of document.querySelectorAll("form button")) {
    button.setAttribute("aria-disabled", value);
  }
}

/** Show what is wrong with a field; nothing is, with an empty text. */
function showFault(field, text) {
  const fault = find(`${field.id}-error`);
  fault.textContent = text;
  fault.hidden = !text;
  field.setAttribute("aria-invalid", Boolean(text));
}

/** Show the line for a command line that checks the same. */
function showCommand() {
  if (!here) return;
  let ports;
  try {
    ports = formatPorts(parsePorts(portsField.value)).replaceAll(",", "");
  } catch {
    return; // not finished typing
  }
  find("command").textContent = `port-checker check ${ports} --server ${here}`;
}

async function copy(text, button) {
  let copied = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // There is no clipboard on plain http, but what is selected can be copied.
    const area = element("textarea", { class: "off-screen" }, text);
    document.body.append(area);
    area.select();
    copied = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.nextElementSibling.textContent = copied ? "Copied." : "Not copied: select the text instead.";
}

function sayChecking(what) {
  say(`Checking ${what}. This takes ${longestCheck} s at most.`, "checking");
}

function say(text, kind = "") {
  find("status").className = kind;
  find("status").textContent = text;
  find("status").scrollIntoView({ block: "nearest" });
}

function count(ports) {
  return ports === 1 ? "1 port" : `${ports} ports`;
}

function element(name, attributes, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function find(id) {
  return document.getElementById(id);
}
