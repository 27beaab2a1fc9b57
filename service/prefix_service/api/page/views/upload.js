// Upload by drag and drop: a folder as PEFT writes it, its progress, and what the service found, in words.
import { html } from "../html.js";
import { useRef, useState } from "../vendor/hooks.js";
import { tenantPath, upload } from "../api.js";
import { bytes, counted } from "../format.js";
import { Copy, Failure, Text } from "../parts.js";

const CONFIG = "adapter_config.json";
const WEIGHTS = "adapter_model.safetensors";
const PICKLES = /\.(bin|pt|pth|pkl|ckpt)$/;

// Every file in what was dropped: [{name, folder, file}].
async function dropped(transfer) {
  const entries = [...transfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
  if (!entries.length) return listed(transfer.files);
  const found = [];
  const walk = async (entry, folder) => {
    if (found.length > 200) return;
    if (entry.isFile) {
      const file = await new Promise((resolve, reject) => entry.file(resolve, reject));
      found.push({ name: file.name, folder, file });
    } else {
      const reader = entry.createReader();
      for (let part = await some(reader); part.length; part = await some(reader)) {
        for (const inside of part) await walk(inside, entry.name);
      }
    }
  };
  for (const entry of entries) await walk(entry, "");
  return found;
}

const some = (reader) => new Promise((resolve, reject) => reader.readEntries(resolve, reject));

const listed = (files) =>
  [...files].map((file) => ({ name: file.name, folder: file.webkitRelativePath.split("/").at(-2) || "", file }));

// What is wrong with a choice of files before anything is sent, or null.
export function objection(files) {
  const names = files.map((one) => one.name);
  const pickle = names.find((name) => PICKLES.test(name));
  const missing = [CONFIG, WEIGHTS].filter((name) => !names.includes(name));
  if (missing.includes(WEIGHTS) && pickle) {
    return `${pickle} is a pickle, which can run code when it is opened, so the service takes none. Make a safe folder of it with: prefix-service convert FOLDER OUTPUT`;
  }
  if (missing.length) return `${missing.join(" and ")} is missing. Drop the folder that PEFT's save_pretrained wrote.`;
  const twice = [CONFIG, WEIGHTS].find((name) => names.filter((other) => other === name).length > 1);
  return twice ? `There are several files ${twice}: drop one adapter at a time.` : null;
}

export function Upload({ tenant, onDone }) {
  const [files, setFiles] = useState([]);
  const [name, setName] = useState("");
  const [isTyped, setIsTyped] = useState(false); // a name that somebody typed stays
  const [over, setOver] = useState(false);
  const [progress, setProgress] = useState(null);
  const [error, setError] = useState(null);
  const [made, setMade] = useState(null);
  const picker = useRef(null);
  const choose = (found) => {
    setFiles(found);
    setMade(null);
    const wrong = objection(found);
    setError(wrong ? { message: wrong } : null);
    const folder = (found.find((one) => one.name === CONFIG)?.folder || "").toLowerCase();
    if (!isTyped) setName(/^[a-z0-9]([a-z0-9._-]{0,62}[a-z0-9])?$/.test(folder) ? folder : "");
  };
  const pick = ({ target }) => {
    choose(listed(target.files));
    target.value = ""; // so that the same files can be chosen again once they were mended
  };
  const drop = async (event) => {
    event.preventDefault();
    setOver(false);
    choose(await dropped(event.dataTransfer));
  };
  const send = async (event) => {
    event.preventDefault();
    const file = (wanted) => files.find((one) => one.name === wanted)?.file;
    const form = new FormData();
    form.append(CONFIG, file(CONFIG));
    if (file("config.json")) form.append("base_model_config", file("config.json"));
    if (file("README.md")) form.append("README.md", file("README.md"));
    form.append(WEIGHTS, file(WEIGHTS));
    setError(null);
    setProgress([0, 1]);
    try {
      const answer = await upload(tenantPath(tenant, "adapters", name, "versions"), form, (sent, all) => setProgress([sent, all]));
      setMade({ ...answer.value, isNew: answer.status === 201 });
      setFiles([]);
      setName("");
      setIsTyped(false);
      onDone();
    } catch (found) {
      setError(found);
    }
    setProgress(null);
  };
  const ready = files.length > 0 && !objection(files);
  return html`<div class="drop ${over ? "over" : ""}"
    onDragOver=${(event) => { event.preventDefault(); setOver(true); }}
      onDragLeave=${() => setOver(false)} onDrop=${drop}>
    <div class="row" style=${{ justifyContent: "center" }}><span>Drop an adapter's folder here, or</span>
      <button type="button" onClick=${() => picker.current.click()}>choose its files</button>
      <input ref=${picker} type="file" multiple hidden onChange=${pick}
        aria-label="Files of an adapter" /></div>
    ${ready && html`<form class="row" style=${{ justifyContent: "center" }} onSubmit=${send}>
      <label>Name of the adapter<input required value=${name} maxlength="64"
        pattern="[a-z0-9]([a-z0-9._\\-]{0,62}[a-z0-9])?"
        title="small letters, digits, dots, hyphens and underscores"
          onInput=${(event) => { setName(event.target.value); setIsTyped(event.target.value !== ""); }} /></label>
      <span class="soft">${counted(files.length, "file")}, ${bytes(files.reduce((all, one) => all + one.file.size, 0))}</span>
      <button class="main" disabled=${progress !== null}>Publish</button></form>`}
    ${progress && html`<progress max=${progress[1]} value=${progress[0]} aria-label="Upload"></progress>
      <p class="soft" aria-live="polite">
        ${progress[0] < progress[1] ? `${bytes(progress[0])} of ${bytes(progress[1])} sent` : "The service checks the files and computes keys and values…"}</p>`}
    <${Failure} error=${error} />
    ${made && html`<div class="notice good" role="status">
      <b>${made.isNew ? "Published: " : "This content is already published: "}<${Text}>
      ${made.tenant}/${made.adapter}@${made.version}</${Text}></b>
      <span>${made.num_layers} layers, ${made.num_kv_heads} key/value heads of ${made.head_dim}, ${made.num_virtual_tokens} virtual tokens,
        as ${made.dtype}; the weights have ${bytes(made.size.weights)}.</span>
      <p>In the worker:</p><pre>${worker(made)}</pre><div class="row"><${Copy} text=${worker(made)} />
      <a class="button" href="#/adapters/${made.tenant}/${made.adapter}@${made.version}">Open this version</a></div></div>`}
  </div>`;
}

const worker = (made) => `prefix = client.get("${made.tenant}/${made.adapter}@${made.version}", batch_size=1)`;
