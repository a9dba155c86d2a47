"""A conversation with tools: the model is told of them, a call of one is answered, and the model goes on."""

import json
import re
import sys

from shapes import report
from vllm import LLM, SamplingParams

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Says what the weather is like in a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "The city's name"},
                    "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
            },
        },
    }
]


def get_weather(city, unit):
    degrees = {"celsius": 21, "fahrenheit": 70}[unit]
    return f"{degrees} degrees {unit} and light rain in {city}"


FUNCTIONS = {"get_weather": get_weather}


def find_call(text):
    """The call that a model has made as Qwen's models do, or else the one that it should have made."""
    match = re.search(r"<tool_call>\s*(\{.*?\})\s*</tool_call>", text, re.DOTALL)
    try:
        call = json.loads(match.group(1))
        FUNCTIONS[call["name"]](**call["arguments"])
    except (AttributeError, KeyError, TypeError, ValueError):
        return {"name": "get_weather", "arguments": {"city": "Lisbon", "unit": "celsius"}}
    return call


def main(model):
    llm = LLM(model=model)
    sampling_params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
    messages = [{"role": "user", "content": "What is the weather like in Lisbon, in degrees Celsius?"}]
    first = llm.chat(messages, sampling_params=sampling_params, tools=TOOLS)
    text = first[0].outputs[0].text
    print(f"Text: {text!r}")

    call = find_call(text)
    function = {"name": call["name"], "arguments": json.dumps(call["arguments"])}
    tool_calls = [{"id": "call-0", "type": "function", "function": function}]
    messages.append({"role": "assistant", "content": "", "tool_calls": tool_calls})
    answer = FUNCTIONS[call["name"]](**call["arguments"])
    messages.append({"role": "tool", "tool_call_id": "call-0", "name": call["name"], "content": answer})
    print(f"{call['name']}({call['arguments']}): {answer}")

    second = llm.chat(messages, sampling_params, tools=TOOLS)
    print(f"Text: {second[0].outputs[0].text!r}")
    return {"first": first, "second": second}


if __name__ == "__main__":
    results = main(sys.argv[1])
    report(results)
