"""litellm as its users call it. Arguments: address, key."""

import sys

import litellm

url, key = sys.argv[1:]
asked = {
    "model": "openai/demo",
    "api_base": f"{url}/v1",
    "api_key": key,
    "max_tokens": 12,
    "temperature": 0,
    "user": "u1",
}
messages = [{"role": "user", "content": "12 + 345?"}]
first = litellm.completion(messages=messages, **asked)
assert first.usage.completion_tokens == 12
messages += [first.choices[0].message, {"role": "user", "content": "and?"}]  # an object, as the openai package has it
second = litellm.completion(messages=messages, **asked)
assert second.usage.prompt_tokens > first.usage.prompt_tokens
chunks = list(litellm.completion(messages=messages, stream=True, stream_options={"include_usage": True}, **asked))
text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
assert text == second.choices[0].message.content, (text, second.choices[0].message.content)
assert chunks[-1].usage.completion_tokens == 12
try:
    litellm.completion(messages=[{"role": "user", "content": "ab " * 1600}], num_retries=0, **asked)
except litellm.ContextWindowExceededError as error:
    assert "maximum context length" in str(error)
else:
    raise AssertionError("a prompt that is too long was taken")
