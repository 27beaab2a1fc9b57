// Lines that use a version, ready to copy. Keys come from the environment, never from here.
export function snippets(version) {
  const url = location.origin;
  const name = `${version.tenant}/${version.adapter}@${version.version}`;
  const model = /^[\w./-]{1,100}$/.test(version.base_model_name_or_path || "") ? version.base_model_name_or_path : "BASE_MODEL";
  return [
    ["curl", `curl -H "Authorization: Bearer $PREFIX_API_KEY" -o prefix.safetensors \\
  '${url}/v1/tenants/${version.tenant}/adapters/${version.adapter}@${version.version}/prefix?batch_size=1'`],
    ["Python", `from prefix_service.client import PrefixClient

client = PrefixClient("${url}")  # PREFIX_API_KEY
prefix = client.get("${name}", batch_size=1)
prefix.past_key_values  # a key and a value tensor for each layer`],
    ["transformers", `from transformers import AutoModelForCausalLM, AutoTokenizer

from prefix_service.client import PrefixClient

tokenizer = AutoTokenizer.from_pretrained("${model}")
model = AutoModelForCausalLM.from_pretrained("${model}")
prefix = PrefixClient("${url}").get("${name}", batch_size=1)
inputs = tokenizer("…", return_tensors="pt")
output = prefix.generate(model, **inputs, max_new_tokens=32)`],
    ["vLLM", `vllm serve ${model} --middleware prefix_service.client.vllm.PrefixMiddleware \\
  --kv-transfer-config '{"kv_connector": "PrefixConnector",
    "kv_connector_module_path": "prefix_service.client.vllm", "kv_role": "kv_consumer",
    "kv_connector_extra_config": {"url": "${url}", "adapters": ["${version.tenant}/*"]}}'`],
    ["OpenAI SDK", `from openai import OpenAI

client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")  # vLLM's address
answer = client.chat.completions.create(
    model="${name}", messages=[{"role": "user", "content": "…"}]
)`],
  ];
}
