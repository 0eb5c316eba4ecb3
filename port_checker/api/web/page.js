"use strict";

// What the service knows: the longest a check takes (seconds), how many ports one request may have, a
// sentence for each result, those for errors by how these begin, and how the errors begin of a port that
// could be connected to.
const { advice, reachable, allReachable, nearby, validCertificate, tlsErrors, longestCheck, maxPorts } =
  JSON.parse(find("page-data").textContent);

// The page may stand under any path: all that it asks for is beside it. A relative URL would have the
// user and password of a link such as https://user:password@checker.example, and fetch takes none.
const url = new URL(".", location.href).href.replace(/\/$/, "");
// A link may lead here by a path or a name of its author's choice, and people paste what they copy into
// a shell. So it holds nothing that a shell would take apart.
const here = /^[A-Za-z0-9._~/:[\]-]+$/.test(url) ? url : null;

// After an answer that says when to ask again: how often that is done, and the longest wait (seconds).
const MAX_REPEATS = 3;
const LONGEST_WAIT = 120;
// Characters of a link that is read, which may have commas as "%2C"; of a list of ports that is shown whole.
const LONGEST_LINK = 8 * maxPorts + 100;
const LONGEST_LIST = 200;

const portsField = find("ports");
const httpsPortField = find("https-port");
const portsTable = document.querySelector("#results table");
const certificateTable = portsTable.cloneNode(true);
portsTable.after(certificateTable);
const title = document.title;
const texts = new Map(); // the result in each table
const link = { ports: "", tls: "" };
let isChecking = false;

find("check").addEventListener("submit", (event) => {
  event.preventDefault();
  check(portsField, (text) => parsePorts(text, maxPorts), checkPorts, portsTable);
});
find("check-certificate").addEventListener("submit", (event) => {
  event.preventDefault();
  check(httpsPortField, parsePort, checkCertificate, certificateTable);
});
portsField.addEventListener("input", followPorts);
httpsPortField.addEventListener("input", () => showFault(httpsPortField, ""));
addEventListener("hashchange", readLink);
find("copy-results").addEventListener("click", ({ target }) => copy([...texts.values()].join("\n"), target));
for (const command of here ? document.querySelectorAll("pre") : []) {
  const heading = command.closest("section").getAttribute("aria-labelledby");
  const button = element("button", { type: "button", "aria-describedby": heading }, "Copy command");
  button.addEventListener("click", () => copy(command.textContent, button));
  command.after(element("p", { class: "actions" }, button, " ", element("span", { role: "status" })));
}
// Where it is secure, nobody on the way can change what comes.
find("plain-http").hidden = isSecureContext;
// Some shells look for files by what is in the brackets of an IPv6 address.
if (here) fill("url", here.includes("[") ? `'${here}'` : here);
readLink();
findAddress().catch((error) => find("status").textContent || say(error.message, "bad"));

/** Read a field with `parse`, and have `run` check what it says, at the visitor's address. */
async function check(field, parse, run, table) {
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
  for (const note of document.querySelectorAll(".actions [role=status]")) note.textContent = "";
  writeLink(field === portsField ? { ports: formatPorts(asked, ",") } : { tls: asked });
  setChecking(true);
  try {
    for (let repeats = 0; ; repeats++) {
      hide(table);
      try {
        // Asked again, since a browser can move to another network while a page is open.
        await run(await findAddress(), asked);
        break;
      } catch (error) {
        hide(table); // it may show a part of the answer
        if (repeats === MAX_REPEATS || !(error.wait <= LONGEST_WAIT)) throw error;
        await countDown(error);
      }
    }
  } catch (error) {
    say(error.message, "bad");
  } finally {
    setChecking(false);
  }
  bringIntoView();
}

async function checkPorts(address, ports) {
  sayChecking(`${count(ports.length)} of ${address}`, ports.length);
  const errors = new Map(); // of the ports that are done
  const asked = { provider_ip: address, ports, perspectives: true };
  const { results, perspectives } = await post("check-ports", asked, (lines) => {
    for (const { port, error } of lines) errors.set(port, error);
    showProgress(errors.size, ports.length);
    showResults(portsTable, `Ports of ${address}, so far`, rowsOf(errors, address));
  });
  const last = Object.entries(results).map(([port, { error }]) => [Number(port), error]);
  const good = last.filter(([, error]) => !error).length;
  const summary =
    last.length === 1
      ? `The port ${good ? "can" : "cannot"} be reached`
      : `${{ 0: "None", [last.length]: "All" }[good] ?? good} ${good === last.length ? "" : "of "}${last.length} ports can be reached`;
  const rows = rowsOf(new Map(last), address, perspectives);
  conclude(portsTable, `Ports of ${address}`, rows, summary, good === last.length);
  find("next").textContent = isPrivate(address) ? nearby.replace("{ip}", address) : allReachable;
  find("next").hidden = good !== last.length && !isPrivate(address);
}

/** Return a row for each result, whose ports share it; what is worst first. */
function rowsOf(errors, address, perspectives) {
  const rows = new Map();
  for (const [port, error] of errors) {
    const places = disagreements(perspectives, !error, "Reachable", ({ results }) => results?.[port]);
    const key = JSON.stringify([error, places]);
    const row = {
      ports: [],
      isGood: !error,
      verdict: error ?? "Reachable",
      sentence: error ? adviceFor(error, address) : reachable,
      places,
    };
    if (!rows.has(key)) rows.set(key, row);
    rows.get(key).ports.push(port);
  }
  return [...rows.values()].sort(
    (one, other) => one.isGood - other.isGood || other.places.length - one.places.length,
  );
}

/** Return a line for each place that disagrees; `good` is a word for a good result, and `find` finds the place's. */
function disagreements(perspectives, isGood, good, find) {
  return (perspectives ?? []).flatMap(({ name, ...place }) => {
    const result = find(place); // there is none if the place was in trouble itself
    if (!result || !result.error === isGood) return [];
    const where = name === "here" ? location.host : name;
    return isGood ? `Not from ${where}: ${result.error}` : `${good} as seen from ${where}.`;
  });
}

async function checkCertificate(address, port) {
  sayChecking(`the certificate on port ${port} of ${address}`);
  const asked = { host: address, port, expected_ip: address, perspectives: true };
  const { valid, error, not_after: until, perspectives } = await post("check-tls", asked);
  const row = valid
    ? { verdict: `Valid until ${formatTime(until)}`, sentence: validCertificate }
    : { verdict: error, sentence: adviceFor(error, address) };
  const isReached = valid || tlsErrors.some((words) => error.startsWith(words));
  const summary = `Port ${port} ${isReached ? `has ${valid ? "a" : "no"} valid certificate` : "cannot be reached"}`;
  const places = disagreements(perspectives, valid, "Valid", ({ result }) => result);
  const rows = [{ ports: [port], isGood: valid, ...row, places }];
  conclude(certificateTable, `Certificate at ${address}`, rows, summary, valid);
}

function post(path, body, onLines) {
  const headers = { "Content-Type": "application/json" };
  if (onLines) headers.Accept = "application/x-ndjson";
  return ask(path, { method: "POST", headers, body: JSON.stringify(body) }, onLines);
}

/**
 * Ask the service, which answers in lines if `onLines` takes them; the last is the answer.
 * An Error's message says what went wrong, in words for people; its `wait`, when to ask again.
 */
async function ask(path, options, onLines) {
  let response, answer;
  try {
    const signal = AbortSignal.timeout?.((longestCheck + 30) * 1000); // Safari has it from 16 on
    response = await fetch(`${url}/${path}`, { cache: "no-store", signal, ...options });
    answer = await (response.ok && onLines ? readLines(response.body, onLines) : response.json());
  } catch {
    if (!response) throw new Error("The service cannot be reached. See whether you are online, and try again.");
    if (response.ok && onLines) throw new Error("The answer broke off, so nothing of it counts. Check again.");
  }
  if (response.ok && answer && !answer.detail) return answer;
  const wait = Number(/^\d+$/.exec(response.headers.get("Retry-After"))); // 0 for a date
  const message =
    answer?.detail?.message ??
    `The service did not answer as it should (HTTP status ${response.status}). ` +
      (wait ? `Try again in ${wait} s.` : "Try again later.");
  // What does not come from the service is asked again only if it limits how often one may ask.
  const mayRepeat = wait && (answer?.detail || response.status === 429);
  throw Object.assign(new Error(message), mayRepeat ? { wait } : {});
}

/** Pass on the lines about ports as they come, and return the last line, which is about all of them. */
async function readLines(body, onLines) {
  let rest = "";
  let last;
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  for (let part; !(part = await reader.read()).done; ) {
    const lines = (rest + part.value).split("\n");
    rest = lines.pop();
    const answers = lines.filter(Boolean).map((line) => JSON.parse(line));
    const ports = answers.filter((answer) => "port" in answer);
    if (ports.length) onLines(ports);
    last = answers.at(-1) ?? last;
  }
  if (!last || "port" in last || rest) throw new Error("There is no last line.");
  return last;
}

/** Show the visitor's address as the service sees it, and return it. */
async function findAddress() {
  const { ip } = await ask("ip");
  find("address").textContent = ip ?? "unknown";
  find("family").textContent = !ip ? "" : ip.includes(":") ? "(IPv6)" : "(IPv4)";
  if (!ip) throw new Error("The service does not see your address, so it cannot check it from here.");
  return ip;
}

/** Tell whether a visitor's address means something only here, and so what the service sees of it, too. */
function isPrivate(address) {
  const ipv4 = /^(10|127|169\.254|192\.168|172\.(1[6-9]|2\d|3[01])|100\.(6[4-9]|[7-9]\d|1[01]\d|12[0-7]))\./;
  return ipv4.test(address) || /^(::|f[cde])/.test(address);
}

/** Write a time of the service's in the visitor's words and time zone. */
function formatTime(text) {
  return new Date(text).toLocaleString(undefined, { dateStyle: "long", timeStyle: "long" });
}

function adviceFor(error, address) {
  return Object.entries(advice).find(([words]) => error.startsWith(words))[1].replace("{ip}", address);
}

/** Show a result, and have it ready to be copied. */
function conclude(table, what, rows, summary, isGood) {
  const caption = `${what}, checked ${new Date().toLocaleString()} by ${here ?? "this service"}`;
  showResults(table, caption, rows);
  const lines = rows.flatMap(({ ports, verdict, sentence, places }) => [
    `${formatPorts(ports)}: ${verdict}. ${sentence}`,
    ...places.map((line) => `  ${line}`),
  ]);
  texts.set(table, [caption, ...lines, summary, ""].join("\n"));
  find("copy-results").parentElement.hidden = false;
  say(`${isGood ? "✓" : "✕"} ${summary}`, isGood ? "good" : "bad");
}

function showResults(table, caption, rows) {
  table.caption.textContent = caption;
  table.tBodies[0].replaceChildren(
    ...rows.map(({ ports, isGood, verdict, sentence, places }) => {
      const sign = element("span", { class: "sign", "aria-hidden": "true" }, isGood ? "✓" : "✕");
      return element(
        "tr",
        { role: "row", class: isGood ? "good" : "bad" },
        element("th", { role: "rowheader", scope: "row", translate: "no" }, listOf(ports)),
        element(
          "td",
          { role: "cell" },
          element("p", { class: "verdict" }, sign, verdict),
          element("p", {}, sentence),
          ...places.map((line) => element("p", { class: "place" }, line)),
        ),
      );
    }),
  );
  find("results").prepend(table); // what is new is near the status
  table.hidden = false;
  find("results").hidden = false;
}

/** Return the list of ports, folded if it is long. */
function listOf(ports) {
  const list = formatPorts(ports);
  if (list.length <= LONGEST_LIST) return list;
  const start = `${count(ports.length)}: ${list.slice(0, list.indexOf(",", 20))}, …`;
  return element("details", {}, element("summary", {}, start), list);
}

function hide(table) {
  table.hidden = true;
  texts.delete(table);
  find("next").hidden = true;
  find("copy-results").parentElement.hidden = !texts.size;
  find("results").hidden = !texts.size;
}

/** Read the ports of the page's link, such as #7466,50800-50899 or #tls=443. */
function readLink() {
  let text = location.hash.slice(1);
  if (text.length > LONGEST_LINK) return;
  try {
    text = decodeURIComponent(text);
  } catch {
    // It is no encoded text.
  }
  for (const part of text.split("&")) {
    if (part.startsWith("tls=")) {
      link.tls = httpsPortField.value = part.slice(4);
      find("certificate").open = true;
    } else if (/\d/.test(part)) {
      link.ports = part;
      portsField.value = part.replace(/,\s*/g, ", ");
    }
  }
  followPorts();
}

function writeLink(parts) {
  const { ports, tls } = Object.assign(link, parts);
  history.replaceState(null, "", `#${[ports, tls && `tls=${tls}`].filter(Boolean).join("&")}`);
}

function showProgress(done, all) {
  const bar = document.querySelector("progress");
  bar.max = all;
  bar.value = done;
  find("done").textContent = `${done} of ${count(all)} done`;
}

/** Tell the seconds until it is time to ask again. */
async function countDown({ message, wait }) {
  say(message, "waiting");
  find("progress").hidden = false;
  document.querySelector("progress").max = wait;
  const end = performance.now() + wait * 1000;
  for (let seconds; (seconds = Math.ceil((end - performance.now()) / 1000)) > 0; ) {
    document.querySelector("progress").value = wait - seconds;
    find("done").textContent = `Trying again in ${seconds} s.`;
    await new Promise((resolve) => setTimeout(resolve, 250));
  }
}

function setChecking(value) {
  isChecking = value;
  if (!value) find("progress").hidden = true;
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

/** Show what the ports mean, and the lines for a shell that check the same. */
function followPorts() {
  showFault(portsField, "");
  const hasForwards = portsField.value.includes(":");
  find("ports-note").textContent = hasForwards ? "Of outer:inner, the outer port is checked." : "";
  let ports;
  try {
    ports = parsePorts(portsField.value, maxPorts);
  } catch {
    return; // not finished typing
  }
  // The program knows what to do with outer:inner.
  fill("ports", hasForwards ? wordsOf(portsField.value).join(" ") : formatPorts(ports, " "));
  fill("list", formatForShell(ports));
}

function fill(name, text) {
  for (const place of document.querySelectorAll(`[data-is=${name}]`)) place.textContent = text;
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

function sayChecking(what, ports) {
  say(`Checking ${what}. This takes ${longestCheck} s at most.`, "checking");
  find("progress").hidden = false;
  find("done").textContent = "";
  if (ports) showProgress(0, ports);
  else document.querySelector("progress").removeAttribute("value");
  bringIntoView();
}

function say(text, kind = "") {
  find("status").className = kind;
  find("status").textContent = text;
  document.title = `${text} · ${title}`;
}

/** Scroll to how it goes, unless all that there is of it can be seen. */
function bringIntoView() {
  const { top, bottom } = find("status").getBoundingClientRect();
  const more = find(isChecking ? "progress" : "results").getBoundingClientRect();
  if (top < 0 || Math.max(bottom, more.bottom) > innerHeight) find("status").scrollIntoView();
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
