# docker build -t cpd-onnx . && docker run --rm -v "$PWD:/work" --user "$(id -u):$(id -g)" cpd-onnx inspect model.onnx
FROM python:3.12-slim AS build
COPY . /source
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels /source

FROM python:3.12-slim
# Extras of the package: "torch,report" for distillation as well, which makes the image several GB larger
ARG EXTRAS=report
RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir "$(echo /wheels/cpd_onnx-*.whl)[${EXTRAS}]" \
    && useradd --create-home --uid 1000 cpd-onnx
ENV HOME=/tmp MPLCONFIGDIR=/tmp
USER cpd-onnx
WORKDIR /work
ENTRYPOINT ["cpd-onnx"]
CMD ["--help"]
