#!/bin/bash
# Tries the set-up on a bare Debian: a chroot with nothing but make and git, with a fresh clone of
# HEAD in /root/vksteer, in which a command is run. Needs root, debootstrap, and 6 GB of space in
# FOLDER.
#
#   tools/bare_machine.sh FOLDER COMMAND...   such as tools/bare_machine.sh /tmp/machine make demo
#   KEEP=1 tools/bare_machine.sh FOLDER COMMAND...
#                                             continue in the machine of the last call; its clone is
#                                             brought to HEAD
#   FIRST='apt-get -y install mesa-vulkan-drivers' tools/bare_machine.sh ...
#                                             run this in it before the clone
set -euo pipefail
cd "$(dirname "$0")/.."
BASE=$1/base RUN=$1/run; shift
SUITE=$(. /etc/os-release; echo "$VERSION_CODENAME")

if [[ ! -e $BASE/complete ]]; then
    rm -rf "$BASE"; mkdir -p "$BASE"
    mirror=$(python3 tools/apt_sources.py own | sed -n 's/^URIs: //p' | head -1)
    debootstrap --variant=minbase --include=ca-certificates,git,make "$SUITE" "$BASE" "$mirror"
    # The chroot reaches its registries as this machine does: with its sources, proxies and
    # certificates.
    python3 tools/apt_sources.py own >"$BASE/etc/apt/sources.list.d/machine.sources"
    rm -f "$BASE/etc/apt/sources.list"
    for f in /etc/apt/apt.conf.d/*registry* /etc/apt/apt.conf.d/*proxy* /etc/pip.conf /etc/xdg/pip \
        /root/.config/pip /etc/ssl/certs/ca-certificates.crt; do
        [[ ! -e $f ]] || { mkdir -p "$BASE/$(dirname "$f")"; cp -a "$f" "$BASE/$(dirname "$f")/"; }
    done
    touch "$BASE/complete"
fi

MOUNTS=(/proc /dev/shm)
for index in /opt/wheels /opt/pypi /opt/pypi-more; do   # package indexes on this disk
    [[ ! -d $index ]] || MOUNTS+=("$index")
done
cleanup() {
    local m
    for m in "${MOUNTS[@]}"; do ! mountpoint -q "$RUN$m" || umount "$RUN$m"; done
}
trap cleanup EXIT
inside() {
    env -i HOME=/root PATH=/usr/sbin:/usr/bin:/sbin:/bin LANG=C.UTF-8 \
        ${PIP_CERT:+PIP_CERT="$PIP_CERT"} ${CI:+CI="$CI"} chroot "$RUN" /bin/bash -c "$1"
}

if [[ -z ${KEEP:-} || ! -e $RUN/complete ]]; then
    cleanup; rm -rf --one-file-system "$RUN"; cp -a "$BASE" "$RUN"
fi
cp /etc/resolv.conf /etc/hosts "$RUN/etc/"
for m in "${MOUNTS[@]}"; do
    mkdir -p "$RUN$m"
    case $m in
        /proc) mount -t proc proc "$RUN$m" ;;
        /dev/shm) mount -t tmpfs tmpfs "$RUN$m" ;;
        *) mount --bind -o ro "$m" "$RUN$m" ;;
    esac
done
[[ -z ${FIRST:-} ]] || inside "export DEBIAN_FRONTEND=noninteractive; apt-get -qq update; $FIRST"
if [[ -d $RUN/root/vksteer ]]; then
    git push -qf "$RUN/root/vksteer" HEAD:refs/heads/incoming
    inside 'cd vksteer 2>/dev/null || cd /root/vksteer; git reset -q --hard incoming'
else
    git clone -q . "$RUN/root/vksteer"
fi
inside "cd /root/vksteer && $*"
