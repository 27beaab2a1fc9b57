"""The demo: real adapters for a real language model, published, fetched and spoken with.

`adapters/` holds three adapters that PEFT trained for SmolLM2-135M-Instruct, and the training state of one of them, in
bfloat16; `soft_prompts/` holds a soft prompt, which `tests/cli/demo/train.py` trained, for the demo to compile. Each
`questions.json` holds what PEFT makes the model say with them, token by token.
"""
