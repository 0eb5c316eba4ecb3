"use strict";

// Beside this page, under whatever path, without the user and password that its URL may have.
const beside = (name) => new URL(name, location.href).href;

// Swagger UI takes its colours from a class, not from the system.
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

SwaggerUIBundle({
  dom_id: "#api",
  url: beside("openapi.json"),
  presets: [SwaggerUIBundle.presets.apis],
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null, // it would send the schema to a site on the internet
  responseInterceptor: async (response) => {
    if (!response.url.endsWith("/openapi.json")) return response;
    const text = useAddress(response.text, await findAddress());
    return { ...response, text, data: text, obj: JSON.parse(text), body: JSON.parse(text) };
  },
});

/** Return the visitor's address; null if nobody knows it. */
async function findAddress() {
  try {
    return (await (await fetch(beside("ip"), { cache: "no-store" })).json()).ip;
  } catch {
    return null;
  }
}

/** Put the visitor's address into the requests that can be executed, which it may check. */
function useAddress(text, address) {
  const schema = JSON.parse(text);
  for (const { post } of address ? Object.values(schema.paths) : []) {
    const content = post?.requestBody.content["application/json"];
    if (!content) continue;
    const { here, ...examples } = JSON.parse(JSON.stringify(content.examples).replaceAll("203.0.113.7", address));
    // Only who is on the service's own machine may check that.
    const isHere = here?.value.provider_ip === address;
    content.examples = isHere ? { here, ...examples } : examples;
  }
  return JSON.stringify(schema);
}
