"""Conversations: one, several at once, and variables of the chat template."""

import sys

from shapes import report
from vllm import LLM

SYSTEM = {"role": "system", "content": "You answer in one sentence."}
QUESTIONS = ["introduce yourself", "What does offline inference mean?", "What is a block table?"]


def show(outputs):
    for output in outputs:
        print(f"Prompt: {output.prompt!r}")
        print(f"Answer: {output.outputs[0].text!r}\n")


def main(model):
    llm = LLM(model=model)
    sampling_params = llm.get_default_sampling_params()
    sampling_params.temperature = 0
    sampling_params.max_tokens = 6
    sampling_params.ignore_eos = True

    conversation = [
        SYSTEM,
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hello! What would you like to know?"},
        {"role": "user", "content": [{"type": "text", "text": "How does prefix caching work?"}]},
    ]
    one = llm.chat(conversation, sampling_params=sampling_params, use_tqdm=False)
    show(one)

    conversations = [[SYSTEM, {"role": "user", "content": question}] for question in QUESTIONS]
    several = llm.chat(conversations, sampling_params)
    show(several)

    quick = llm.chat(conversations[0], sampling_params, chat_template_kwargs={"enable_thinking": False})
    show(quick)

    begun = [*conversations[0], {"role": "assistant", "content": "I am"}]
    continued = llm.chat(begun, sampling_params, add_generation_prompt=False, continue_final_message=True)
    show(continued)
    return {"one": one, "several": several, "quick": quick, "continued": continued}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
