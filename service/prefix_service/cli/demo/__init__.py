"""The demo: real adapters for a real language model, published, fetched and spoken with.

`adapters/` holds three adapters that PEFT trained for SmolLM2-135M-Instruct, and the training state of one of them, in
bfloat16; `questions.json` holds what PEFT makes the model say with them, token by token.
"""
