"""instructor in its mode for servers without tools. A model without training gives no JSON: that is all that may go wrong."""

import sys

import instructor
import openai
from pydantic import BaseModel

url, key = sys.argv[1:]


class Sum(BaseModel):
    value: int


client = instructor.from_openai(
    openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0), mode=instructor.Mode.MD_JSON
)
asked = {"model": "demo", "max_tokens": 12, "messages": [{"role": "user", "content": "2"}]}
try:
    client.chat.completions.create(response_model=Sum, max_retries=1, **asked)
except Exception as error:  # noqa: BLE001 - which one depends on the version
    told = repr(error)
    assert "context_length" not in told and "unsupported" not in told and "BadRequest" not in told, told
