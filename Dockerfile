# The image of Obscura Server: the program, the C library it needs, and nothing to log in to.
#
#   docker build --tag obscura-server .
#   docker run --detach --publish 3000:3000 --volume obscura:/data obscura-server

# The same Debian as the image below, so that the program finds the C library that it was built for.
FROM rust:1.95-slim-bookworm AS build
WORKDIR /build

# The memory allocator is built with make.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*

# All dependencies, in a layer that stays while they stay. The program around them does nothing.
# Of the load tool only its manifest is needed, because the lock file is that of both. The allocator takes the page size of the
# machine that it is built on for the largest there is; on ARM there are machines with 16 and 64 KiB.
COPY Cargo.toml Cargo.lock build.rs ./
COPY .cargo .cargo
COPY load/Cargo.toml load/
COPY proto proto
RUN mkdir src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && if [ "$(uname -m)" = aarch64 ]; then export JEMALLOC_SYS_WITH_LG_PAGE=16; fi \
    && cargo build --release --locked \
    && rm -r src

COPY migrations migrations
COPY openapi.yaml ./
COPY src src
# Cargo looks at the time of a file, and what was copied may be older than what was built above.
RUN touch src/main.rs src/lib.rs \
    && if [ "$(uname -m)" = aarch64 ]; then export JEMALLOC_SYS_WITH_LG_PAGE=16; fi \
    && cargo build --release --locked \
    && mkdir /data

# Not a static program on an empty image: musl's memory allocator is slow for many threads, and certificates of the
# authorities, for S3 and databases by TLS, would have to be copied anyway.
FROM gcr.io/distroless/cc-debian12:nonroot
COPY --from=build /build/target/release/obscura-server /obscura-server
COPY --from=build --chown=65532:65532 /data /data

# Embedded mode, unless this is set to nothing. A variable and no argument, so that commands such as `after-restore` and
# the health check hear of it too.
ENV OBSCURA_DATA_DIR=/data
# Within the container's own network; what is published of it says `docker run` or the compose file.
ENV OBSCURA_SERVER_MGMT_HOST=0.0.0.0
VOLUME /data
EXPOSE 3000 9090
# `nonroot`, by its number, so that Kubernetes can see that it is not root.
USER 65532:65532
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 CMD ["/obscura-server", "healthcheck"]
ENTRYPOINT ["/obscura-server"]
