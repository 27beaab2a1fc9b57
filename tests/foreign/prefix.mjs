// Publishes an adapter and fetches its prefix. Needs Node.js 18 or later, and no package.
//
//     export PREFIX_URL=http://127.0.0.1:8080 PREFIX_API_KEY=pfx_…
//     node prefix.mjs acme/capitals@prod          # fetches what the reference names
//     node prefix.mjs acme/capitals folder        # first publishes the folder that PEFT's save_pretrained wrote
//
// Prints each tensor's name, dtype, shape, first element and the SHA-256 of its bytes, as JSON. On an error it prints
// the service's reason on standard error and ends with status 1.

import { createHash } from "node:crypto";
import { readFile } from "node:fs/promises";
import { join } from "node:path";

const url = process.env.PREFIX_URL ?? "http://127.0.0.1:8080";
const key = process.env.PREFIX_API_KEY ?? "";

/** Returns a successful response; any other is an error with the service's reason. */
async function send(path, options = {}) {
  const headers = { Authorization: `Bearer ${key}`, ...options.headers };
  const response = await fetch(url + path, { ...options, headers });
  if (!response.ok) {
    const text = await response.text();
    const isProblem = response.headers.get("Content-Type") === "application/problem+json"; // RFC 9457
    throw new Error(`${response.status}: ${isProblem ? JSON.parse(text).detail : text}`);
  }
  return response;
}

/** Returns the path of the version that the folder has become, or was already. */
async function publish(adapter, folder) {
  const form = new FormData();
  for (const field of ["adapter_config.json", "adapter_model.safetensors"]) { // in this order
    form.append(field, new Blob([await readFile(join(folder, field))]), field);
  }
  const response = await send(`${adapter}/versions`, { method: "POST", body: form });
  await response.arrayBuffer(); // to its end, or the connection would not be used again
  return response.headers.get("Location");
}

/** Reads a safetensors file: eight bytes of header length, a JSON header, then the bytes of all tensors. */
function decode(file) {
  const data = 8 + Number(new DataView(file).getBigUint64(0, true));
  const { __metadata__, ...entries } = JSON.parse(new TextDecoder().decode(new Uint8Array(file, 8, data - 8)));
  return Object.entries(entries).map(([name, { dtype, shape, data_offsets: [start, stop] }]) => {
    const bytes = new Uint8Array(file, data + start, stop - start);
    const sha256 = createHash("sha256").update(bytes).digest("hex");
    return { name, dtype, shape, first: first(dtype, bytes), sha256 };
  });
}

function first(dtype, bytes) {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  switch (dtype) {
    case "F32": return view.getFloat32(0, true); // or all of them: new Float32Array(file, data + start, count)
    case "I64": return Number(view.getBigInt64(0, true));
    default: return null; // JavaScript has no half precision here: ask for dtype=float32
  }
}

async function main(reference, folder) {
  const [tenant, name] = reference.split("/");
  let adapter = `/v1/tenants/${tenant}/adapters/${name}`;
  if (folder !== undefined) {
    adapter = await publish(adapter, folder);
  }
  const rows = await send(`${adapter}/prefix?batch_size=2`);
  const rowsFile = await rows.arrayBuffer();
  const masked = await send(`${adapter}/prefix`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ attention_mask: [[0, 1, 1], [1, 1, 1]] }),
  });
  const maskedFile = await masked.arrayBuffer();
  console.log(JSON.stringify({ adapter, rows: decode(rowsFile), masked: decode(maskedFile) }));
}

try {
  await main(...process.argv.slice(2));
} catch (error) {
  console.error(error.cause?.message ?? error.message); // fetch hides what happened to the connection in `cause`
  process.exit(1);
}
