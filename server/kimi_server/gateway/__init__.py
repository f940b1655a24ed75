"""The HTTP gateway in front of vLLM servers: API keys, admission, routing."""
