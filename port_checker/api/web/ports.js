"use strict";

/** Return the words of a list of ports and ranges, as people write them. */
function wordsOf(text) {
  return text
    .replace(/\s*\/\s*tcp\b/gi, "")
    .replace(/\s*(?:[-‐‑‒–—―−]|\bto\b)\s*/gi, "-")
    .replace(/\s*:\s*/g, ":")
    .split(/(?:[\s,;&]|\band\b)+/i)
    .filter(Boolean);
}

/** Return the ports of a text like "7466, 50800-50899", each once; of outer:inner, the outer ones. */
function parsePorts(text, maxPorts) {
  const ports = new Set();
  for (const word of wordsOf(text)) {
    const match = /^(\d{1,5})(?:-(\d{1,5}))?(?::\d{1,5}(?:-\d{1,5})?)?$/.exec(word);
    const low = Number(match?.[1]);
    const high = Number(match?.[2] ?? match?.[1]);
    if (!(1 <= low && low <= high && high <= 65535)) {
      const start = word.length > 30 ? `${word.slice(0, 30)}…` : word;
      throw new Error(`“${start}” is neither a port (1 to 65535) nor a range such as 50800-50899.`);
    }
    // Looked at before and after, so that a link with many large ranges is little work.
    const isTooLarge = high - low >= maxPorts;
    for (let port = low; port <= high && !isTooLarge; port++) ports.add(port);
    if (isTooLarge || ports.size > maxPorts) {
      throw new Error(`These are too many ports for one check. Enter at most ${maxPorts}.`);
    }
  }
  if (!ports.size) throw new Error("Enter at least one port.");
  return [...ports];
}

function parsePort(text) {
  const port = /^\s*\d{1,5}\s*$/.test(text) ? Number(text) : 0;
  if (!(1 <= port && port <= 65535)) throw new Error("Enter one port (1 to 65535), such as 443.");
  return port;
}

/** Return the first and last port of each run. */
function runsOf(ports) {
  const runs = [];
  for (const port of [...ports].sort((a, b) => a - b)) {
    if (runs.at(-1)?.[1] === port - 1) runs.at(-1)[1] = port;
    else runs.push([port, port]);
  }
  return runs;
}

/** Write ports like "7466, 50800-50899". */
function formatPorts(ports, separator = ", ") {
  return runsOf(ports).map(([low, high]) => (low === high ? low : `${low}-${high}`)).join(separator);
}

/** Write ports as a shell expands them to a list: "7466,$(seq -s, 50800 50899)". */
function formatForShell(ports) {
  return runsOf(ports).map(([low, high]) => (low === high ? low : `$(seq -s, ${low} ${high})`)).join(",");
}
