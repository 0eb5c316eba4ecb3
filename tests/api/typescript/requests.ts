// What the types that openapi-typescript generates accept, and what they refuse: the compiler fails
// where it finds no error in a line that is marked as one.
import type { paths } from "./schema";

type Body<Path extends "/check-ports" | "/check-tls"> =
  paths[Path]["post"]["requestBody"]["content"]["application/json"];

export const ports: Body<"/check-ports"> = { provider_ip: "203.0.113.7", ports: [7466, 50800] };
export const address: Body<"/check-tls"> = { host: "203.0.113.7", port: 443 };
export const name: Body<"/check-tls"> = {
  host: "provider.example",
  port: 443,
  expected_ip: "203.0.113.7",
};

// @ts-expect-error
export const noPorts: Body<"/check-ports"> = {};
// @ts-expect-error
export const nothing: Body<"/check-tls"> = {};
// @ts-expect-error
export const noPort: Body<"/check-tls"> = { host: "203.0.113.7" };
// @ts-expect-error
export const noHost: Body<"/check-tls"> = { port: 443 };
// @ts-expect-error
export const portInText: Body<"/check-tls"> = { host: "203.0.113.7", port: "443" };
