// What the codes of problems mean to an operator. `kind` marks those that need somebody to act.
const WORDS = {
  "unauthenticated": ["", "Without a key, or with one that is wrong, expired or revoked."],
  "forbidden": ["", "The key's scope is too small for what was asked."],
  "read-only": ["", "A change was sent to a service that was started with --read-only: send it to the one that writes."],
  "not-found": ["", "What was asked for does not exist, or belongs to another tenant."],
  "invalid-request": ["", "A parameter or a body was malformed."],
  "invalid-reference": ["", "A name, version or alias was not well formed."],
  "invalid-config": ["", "An uploaded adapter_config.json cannot be used."],
  "invalid-checkpoint": ["", "An uploaded weights file is malformed or does not fit its config."],
  "unsafe-checkpoint": ["", "A pickle was uploaded: prefix-service convert makes a safe folder of it."],
  "rate-limited": ["warn", "A tenant asks more often than its requests_per_second allows: see Tenants and keys."],
  "overloaded": ["bad", "Too much is in flight or waits for memory. Add workers or replicas, or raise PREFIX_MAX_IN_FLIGHT or PREFIX_WORK_BYTES."],
  "quota-exceeded": ["warn", "A tenant has used up its adapters or bytes: see Tenants and keys."],
  "out-of-space": ["bad", "A disk or a memory budget is used up. Free space, or raise PREFIX_DEVICE_BYTES or PREFIX_RENDERING_BYTES."],
  "too-large": ["", "More bytes were sent than the limit allows."],
  "storage-failed": ["bad", "The disk or the catalog refused. Look at the service's log and the disk."],
  "corrupt-blob": ["bad", "Stored bytes no longer match their digest. Publish the same files again, and check the disk."],
  "internal": ["bad", "A defect of the service: its log says more."],
  "request-timeout": ["", "A request did not arrive in time: a slow caller or network."],
  "aborted": ["", "The caller went away before the answer."],
};

export function words(code) {
  const [kind, why] = WORDS[code] || ["", "The reference at /docs lists what this code means."];
  return { kind, why };
}
