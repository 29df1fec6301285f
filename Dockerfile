# CPU:  docker build -t dit-sparse .
# CUDA: docker build -t dit-sparse --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu130 .
FROM python:3.12-slim
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# The cpu executor and Triton compile at first use. The version of g++ is that of the base image.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*

WORKDIR /opt/dit-sparse
COPY . .
RUN pip install --no-cache-dir torch==2.13.0 --index-url "${TORCH_INDEX}" \
    && pip install --no-cache-dir '.[demo]' -c constraints.txt

RUN useradd --create-home --uid 1000 user
USER 1000
WORKDIR /home/user
ENTRYPOINT ["dit-sparse"]
CMD ["--help"]
