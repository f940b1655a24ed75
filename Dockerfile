# Kimi Linear on NVIDIA GPUs:
#   docker build -t kimi-linear . && docker run --gpus all -p 8000:8000 kimi-linear MODEL --trust-remote-code
# The base image holds vLLM, torch for CUDA and setuptools; the install adds this project and fla-core.
FROM vllm/vllm-openai:v0.32.0
WORKDIR /opt/kimi-linear
COPY . .
RUN python3 -m pip install --no-cache-dir --no-build-isolation '.[cuda]' \
    && python3 -m vllm_kimi_linear.install_check \
    && useradd --create-home --uid 10001 kimi
USER kimi
WORKDIR /home/kimi
EXPOSE 8000
ENTRYPOINT ["vllm", "serve"]
