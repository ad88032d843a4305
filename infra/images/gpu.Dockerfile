# GPU worker. From the project's root: docker build -f infra/images/gpu.Dockerfile -t requant:gpu .
# PyPI's torch brings CUDA's libraries, the host its driver; Triton compiles with gcc. vLLM needs a torch of its own: apart.
FROM python:3.11-slim-bookworm
ARG VLLM=0.32.0
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONUNBUFFERED=1 XDG_CACHE_HOME=/work/cache PREFECT_HOME=/work/prefect
# Kubernetes starts flows without the command line, which would set these.
ENV DO_NOT_TRACK=1 PREFECT_SERVER_ANALYTICS_ENABLED=false
RUN apt-get update -q && apt-get install -y -q --no-install-recommends gcc g++ libc6-dev && rm -rf /var/lib/apt/lists/*
RUN python -m venv /opt/vllm && /opt/vllm/bin/pip install "vllm==$VLLM"
ENV REQUANT_VLLM="/opt/vllm/bin/vllm serve"
WORKDIR /requant
COPY constraints.txt pyproject.toml README.md LICENSE NOTICE ./
RUN pip install "$(grep '^torch==' constraints.txt)"
COPY requant requant
COPY flows flows
COPY tasks tasks
COPY infra infra
RUN pip install -c constraints.txt -e .
COPY deployments deployments
RUN useradd --create-home --uid 1000 requant && install -d -o requant /work
USER requant
VOLUME /work
