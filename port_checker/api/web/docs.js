"use strict";

// Swagger UI takes its colours from a class, not from the system.
const dark = matchMedia("(prefers-color-scheme: dark)");
const follow = () => document.documentElement.classList.toggle("dark-mode", dark.matches);
dark.addEventListener("change", follow);
follow();

SwaggerUIBundle({
  dom_id: "#api",
  url: "openapi.json", // beside this page, under whatever path
  presets: [SwaggerUIBundle.presets.apis],
  deepLinking: true,
  tryItOutEnabled: true,
  validatorUrl: null, // it would send the schema to a site on the internet
});
