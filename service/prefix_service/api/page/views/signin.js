// Signing in with a key, which is sent once and kept nowhere.
import { html } from "../html.js";
import { useState } from "../vendor/hooks.js";
import { hasEnded, signIn } from "../api.js";
import { Failure } from "../parts.js";

export function SignIn() {
  const [error, setError] = useState(null);
  const [busy, setBusy] = useState(false);
  const submit = async (event) => {
    event.preventDefault();
    const field = event.currentTarget.elements.key;
    setBusy(true);
    try {
      await signIn(field.value.trim());
    } catch (found) {
      field.value = "";
      setError(found);
      setBusy(false);
    }
  };
  return html`<div class="signin card"><form class="stack" onSubmit=${submit}>
    <h1>prefix-service</h1>
    ${hasEnded.value && html`<p role="status">Your session has ended, or your key has: sign in again.</p>`}
    <label>Key<input name="key" type="password" autocomplete="off" required autofocus placeholder="pfx_…" /></label>
    <button class="main" disabled=${busy}>Sign in</button>
    <${Failure} error=${error} />
    <p class="soft">The service wrote its first key to <code>bootstrap.key</code> in the data folder. An admin makes other keys
      under <i>Tenants and keys</i>, or with <code>prefix-service key create</code>. You stay signed in for up to 12 hours,
      or until an hour has passed without use; this browser keeps no key.</p>
  </form></div>`;
}
