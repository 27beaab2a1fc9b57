// What the codes of problems mean to an operator. `kind` marks those that need somebody to act.
const WORDS = {
  "unauthenticated": ["", "Callers sent no key, or one that is wrong, expired or revoked."],
  "forbidden": ["", "Callers sent requests that need a key with a larger scope."],
  "read-only": ["", "Callers sent changes to a service that runs with --read-only: send them to the service that writes."],
  "not-found": ["", "Callers asked for something that does not exist, or belongs to another tenant."],
  "method-not-allowed": ["", "Callers sent a method that the path does not have."],
  "not-acceptable": ["", "Callers sent an Accept header that leaves the answer out."],
  "conflict": ["", "Callers asked for a change that something else forbids: an alias points at a version that is to be deleted."],
  "gone": ["", "Callers asked for changes that the service no longer keeps (PREFIX_CHANGES_DAYS): they read everything again."],
  "precondition-failed": ["", "Somebody else changed what a caller wanted to change; nothing was overwritten."],
  "malformed-request": ["", "Callers or a proxy sent something that is not HTTP/1.1."],
  "header-fields-too-large": ["", "Callers sent a head of more than 64 KiB or 100 fields."],
  "uri-too-long": ["", "Callers sent a path and query of more than 8,000 bytes."],
  "unsupported-media-type": ["", "Callers sent a body of another type, or a compressed one."],
  "range-not-satisfiable": ["", "Callers asked for bytes behind the end of a body."],
  "invalid-request": ["", "Callers sent a malformed parameter or body."],
  "invalid-input": ["", "Callers sent something that cannot be accepted."],
  "invalid-reference": ["", "Callers sent a malformed name, version or alias."],
  "invalid-config": ["", "An uploaded adapter_config.json cannot be used."],
  "invalid-checkpoint": ["", "An uploaded weights file is malformed or does not fit its config."],
  "unsafe-checkpoint": ["", "A caller uploaded a pickle: prefix-service convert makes a safe folder of it."],
  "rate-limited": ["warn", "A tenant sends more requests than its requests_per_second allows: see Tenants and keys."],
  "overloaded": ["bad", "Too many requests are in flight, or wait for memory. Add workers or replicas, or raise PREFIX_MAX_IN_FLIGHT or PREFIX_WORK_BYTES."],
  "quota-exceeded": ["warn", "A tenant has used up its adapters or bytes: see Tenants and keys."],
  "unavailable": ["bad", "Something that the service needs is away or used up: the blob folder or bucket, room in memory, or file descriptors. The service's log says which."],
  "out-of-space": ["bad", "A disk or a memory budget is used up. Free space, or raise PREFIX_DEVICE_BYTES or PREFIX_RENDERING_BYTES."],
  "too-large": ["", "Callers sent more bytes than the limit allows."],
  "storage-failed": ["bad", "The disk or the catalog refused a read or a write. Look at the service's log and the disk."],
  "corrupt-blob": ["bad", "Stored bytes no longer match their digest. Publish the same files again, and check the disk."],
  "internal": ["bad", "A defect of the service: its log says more."],
  "request-timeout": ["", "Requests did not arrive in time: the callers or the network are slow."],
  "aborted": ["", "Callers closed the connection before the answer was complete."],
};

export function words(code) {
  const [kind, why] = WORDS[code] || ["", "The reference at /docs lists what this code means."];
  return { kind, why };
}
