# Kimi Linear on NVIDIA GPUs:
#   docker build -t kimi-linear .
#   docker run --gpus all --shm-size 8g -p 8000:8000 -v kimi-weights:/weights kimi-linear \
#       /weights/MODEL --trust-remote-code
# The base image holds vLLM, torch for CUDA and setuptools; the install adds this project, its
# gateway, fla-core, and Ray for models spread over several machines.
ARG BASE=vllm/vllm-openai:v0.32.0
FROM ${BASE}
LABEL org.opencontainers.image.title="vllm-kimi-linear" \
      org.opencontainers.image.description="Kimi Linear on vLLM for NVIDIA GPUs, and its gateway" \
      org.opencontainers.image.licenses="Apache-2.0"
WORKDIR /opt/kimi-linear
COPY . .
RUN python3 -m pip install --no-cache-dir --no-build-isolation '.[cuda,server,ray]' \
    && python3 -m vllm_kimi_linear.supported.install_check \
    && useradd --create-home --uid 10001 kimi \
    && install --directory --owner=kimi /weights
USER 10001
WORKDIR /home/kimi
# Nothing is fetched or reported at run time; only the pull of the weights sets HF_HUB_OFFLINE=0.
ENV HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 HEALTH_URL=http://127.0.0.1:8000/health
VOLUME /weights
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=45m \
    CMD ["python3", "-c", "import os, urllib.request as u; u.urlopen(os.environ['HEALTH_URL'], timeout=4)"]
ENTRYPOINT ["vllm", "serve"]
