#!/usr/bin/env bash
# Builds, pushes and pins the container images with podman, buildah or docker, whichever is there.
#
#   images/build.sh build [service|trainer|rollout ...]     all three without a name
#   images/build.sh push  [service|trainer|rollout ...]     to REGISTRY; prints options of `saferlhf compile`
#   images/build.sh pin                                     lets bases.env name what its tags mean in the registry now
#
# Environment: REGISTRY (localhost), TAG (the commit), BUILDER, PIP_CONF (a pip.conf, mounted as a secret),
# BUILD_OPTIONS (for the builder), REGISTRY_OPTIONS (for push and skopeo), REVISION (the commit),
# SOURCE_DATE_EPOCH (the commit's time), SERVICE_BASE, TRAINER_BASE, ROLLOUT_BASE (instead of bases.env).
set -euo pipefail
cd "$(dirname "$0")/.."

no_checkout="this is no git checkout: set REVISION and SOURCE_DATE_EPOCH"

fail() { echo "images: $*" >&2; exit 1; }

find_builder() {
    local name
    for name in ${BUILDER:-podman buildah docker}; do
        if command -v "$name" >/dev/null && "$name" info >/dev/null 2>&1; then echo "$name"; return; fi
    done
    fail "no ${BUILDER:-podman, buildah or docker} works here: apt-get install podman, or start docker"
}

commit() { # the commit of the checkout; "-dirty" where files that an image holds, or is built by, differ from it
    local sha
    sha=$(git rev-parse HEAD 2>/dev/null) || fail "$no_checkout"
    local parts=(LICENSE README.md pyproject.toml requirements.lock components pipelines images)
    [ -z "$(git status --porcelain -- "${parts[@]}")" ] || sha+=-dirty
    echo "$sha"
}

creation() { # time of the commit, for the image's label
    if [ -n "${SOURCE_DATE_EPOCH:-}" ]; then
        date -u -d "@$SOURCE_DATE_EPOCH" +%FT%TZ
    else
        git log -1 --format=%cI 2>/dev/null || fail "$no_checkout"
    fi
}

base_of() { # an image's base: from the environment, else from bases.env; by digest, or made on this machine
    local variable="${1^^}_BASE" base
    base=${!variable:-$(sed -n "s/^$variable=//p" images/bases.env)}
    [[ $base == *@sha256:* || $base == localhost/* ]] ||
        fail "$variable=$base is not pinned: write NAME:TAG@sha256:DIGEST, or run 'make images-pin'"
    echo "$base"
}

build() {
    local name=$1 base id epoch created image="$registry/saferlhf/$1:$tag"
    base=$(base_of "$name")
    created=$(creation)
    id=$(mktemp)
    # Files get the time of the last change of what is installed: with the commit's own time, every commit would make
    # new layers out of the same gigabytes.
    epoch=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct -- requirements.lock images/bases.env "images/$name")}
    local options=(--file "images/$name/Dockerfile" --tag "$image" --iidfile "$id"
        --build-arg "BASE=$base" --build-arg "REVISION=$revision" --build-arg "VERSION=$version"
        --build-arg "CREATED=$created" --build-arg "SOURCE_DATE_EPOCH=$epoch")
    if [ "$builder" = docker ]; then export SOURCE_DATE_EPOCH=$epoch; else options+=(--layers --timestamp "$epoch"); fi
    if [ -n "${PIP_CONF:-}" ]; then options+=(--secret "id=pip.conf,src=$PIP_CONF"); fi
    # shellcheck disable=SC2086  # BUILD_OPTIONS holds several words
    "$builder" build "${options[@]}" ${BUILD_OPTIONS:-} . || fail "$image was not built"
    echo "built $image, id $(cat "$id")" && rm "$id"
}

push() {
    local name=$1 image="$registry/saferlhf/$1:$tag" digests digest
    [ "$registry" != localhost ] || fail "say where to push: make images-push REGISTRY=registry.example.com/team"
    digests=$(mktemp)
    # shellcheck disable=SC2086
    if [ "$builder" = docker ]; then
        docker push ${REGISTRY_OPTIONS:-} "$image" >&2
        docker image inspect --format '{{range .RepoDigests}}{{println .}}{{end}}' "$image" |
            sed -n "s|^$registry/saferlhf/$name@||p" > "$digests"
    else
        "$builder" push ${REGISTRY_OPTIONS:-} --digestfile "$digests" "$image" >&2
    fi || fail "$image was not pushed"
    digest=$(cat "$digests") && rm "$digests"
    echo "--image-$name $registry/saferlhf/$name@$digest"
}

pin() {
    local line variable base digest
    command -v skopeo >/dev/null || fail "skopeo is needed to ask the registry: apt-get install skopeo"
    while read -r line; do
        variable=${line%%=*} base=${line#*=} && base=${base%@*}
        # shellcheck disable=SC2086
        digest=$(skopeo inspect ${REGISTRY_OPTIONS:-} --format '{{.Digest}}' "docker://$base") ||
            fail "$base: no digest"
        sed -i "s|^$variable=.*|$variable=$base@$digest|" images/bases.env
        echo "$variable=$base@$digest"
    done < <(grep -E '^[A-Z]+_BASE=' images/bases.env)
}

main() {
    action=${1:-build} && shift || true
    [ "$action" != pin ] || { pin; exit; }
    builder=$(find_builder)
    registry=${REGISTRY:-localhost}
    revision=${REVISION:-$(commit)}
    tag=${TAG:-$revision}
    version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
    [ $# -gt 0 ] || set -- service trainer rollout
    for name in "$@"; do
        [ -f "images/$name/Dockerfile" ] || fail "there is no image '$name': choose service, trainer or rollout"
        case $action in
            build) build "$name" ;;
            push) push "$name" ;;
            *) fail "unknown action '$action': build, push or pin" ;;
        esac
    done
}

main "$@"  # the last line: bash has read everything before it starts
