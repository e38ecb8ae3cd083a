#!/usr/bin/python3
"""Networks end to end: Debian's kernel with virtio cards.

    network.py VSOCK_TOOL       all of it
    network.py --in-namespace   the part with a tap interface, in a network namespace of its own

User networking: an address by DHCP, files with checksums to the guest and back, a forwarded port,
vsock both ways, a capture. Two guests on one socket. A tap interface with offloads, where the
kernel lets us have one.
All traffic stays on this host's loopback interface.
"""

import hashlib
import os
import socket
import struct
import subprocess
import sys
import threading
import urllib.request

import guest
import web

MODULES = ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci",
           "failover", "net_failover", "virtio_net", "vsock", "vmw_vsock_virtio_transport_common",
           "vmw_vsock_virtio_transport"]

PREPARE = "".join(f"insmod /lib/{name}.ko\n" for name in MODULES) + "ip link set lo up\n"

USER = PREPARE + r"""
cat >/tmp/bound <<'END'
[ "$1" = bound ] || exit 0
ip addr add $ip/24 dev $interface
ip route add default via $router
echo "net: address $ip $router $dns"
END
chmod 755 /tmp/bound
ip link set eth0 up
udhcpc -i eth0 -s /tmp/bound -n -q -t 20 >/dev/null 2>&1 || echo "net: no address"
echo "net: mac $(cat /sys/class/net/eth0/address)"
ip addr show dev eth0 | grep -q 'inet 10.0.2.15/24' && echo "net: address 10.0.2.15"
ping -c 2 -W 5 10.0.2.2 >/dev/null && echo "net: ping"
wget -q -O /tmp/blob http://10.0.2.2:PORT/blob
echo "net: down $(md5sum </tmp/blob | cut -c1-32)"
dd if=/dev/urandom bs=64k count=64 2>/dev/null | base64 >/tmp/mine # wget posts text only
echo "net: up $(md5sum </tmp/mine | cut -c1-32)"
wget -q -O /dev/null --post-file /tmp/mine http://10.0.2.2:PORT/upload
mkdir /tmp/www
cp /tmp/mine /tmp/www/mine
httpd -p 80 -h /tmp/www
vsock_tool echo 52 &
echo "hello from the guest" | vsock_tool send 7000 >/tmp/heard
echo "net: heard $(cat /tmp/heard)"
echo hello | vsock_tool send 7001 2>/dev/null || echo "net: nobody at 7001"
wget -q -O /dev/null http://10.0.2.2:PORT/wait
"""

SERVE = PREPARE + r"""
ip addr add 192.168.7.1/24 dev eth0
ip link set eth0 up
mkdir /tmp/www
dd if=/dev/urandom of=/tmp/www/blob bs=64k count=64 2>/dev/null
echo "net: blob $(md5sum </tmp/www/blob | cut -c1-32)"
httpd -p 80 -h /tmp/www
nc -l -p 99 >/dev/null
"""

FETCH = PREPARE + r"""
ip addr add 192.168.7.2/24 dev eth0
ip link set eth0 up
for i in $(seq 60); do
    wget -q -O /tmp/blob http://192.168.7.1/blob && break
    sleep 1
done
echo "net: blob $(md5sum </tmp/blob | cut -c1-32)"
for i in $(seq 60); do
    echo bye | nc -w 2 192.168.7.1 99 && break
    sleep 1
done
"""

TAP = PREPARE + r"""
ip addr add 192.168.9.2/24 dev eth0
ip link set eth0 up
echo "net: mtu $(cat /sys/class/net/eth0/mtu)"
wget -q -O /tmp/blob http://192.168.9.1:PORT/blob
echo "net: down $(md5sum </tmp/blob | cut -c1-32)"
dd if=/dev/urandom bs=64k count=64 2>/dev/null | base64 >/tmp/mine
echo "net: up $(md5sum </tmp/mine | cut -c1-32)"
wget -q -O /dev/null --post-file /tmp/mine http://192.168.9.1:PORT/upload
"""


def md5(data):
    """As md5sum prints it."""
    return hashlib.md5(data).hexdigest()


def boot(directory, script, *options, programs=()):
    """A guest that runs a script."""
    os.makedirs(directory, exist_ok=True)
    initramfs = guest.initramfs(directory, script, *guest.modules(MODULES), *programs)
    return guest.Guest("--engine", "interp", "--kernel", guest.kernel(), "--initrd", initramfs,
                       "--append", "console=ttyS0 quiet", "--memory", "256M", *options)


def told(vm):
    """What a script said: {WHAT: rest} of its lines "net: WHAT REST"."""
    lines = [line.split(" ", 2) for _, line in vm.lines if line.startswith("net: ")]
    return {line[1]: line[2] if len(line) > 2 else "" for line in lines}


def captured(path):
    """The packets of a capture, or None when it is none."""
    with open(path, "rb") as file:
        data = file.read()
    if data[:8] != struct.pack("<IHH", 0xa1b23c4d, 2, 4) or data[20:24] != b"\1\0\0\0":
        return None
    packets, at = [], 24
    while at < len(data):
        length, full = struct.unpack_from("<II", data, at + 8)
        if length != full or at + 16 + length > len(data):
            return None
        packets.append(data[at + 16:at + 16 + length])
        at += 16 + length
    return packets


def free_port():
    """A port of the loopback interface that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def answer_once(path):
    """A program of the host's at a vsock port: says back what it heard, in capitals."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()

    def serve():
        peer, _ = listener.accept()
        with peer:
            heard = b""
            while data := peer.recv(4096):
                heard += data
            peer.sendall(heard.upper())

    threading.Thread(target=serve, daemon=True).start()
    return listener


def vsock_echo(path):
    """Sends a megabyte to the guest's echo and returns whether it came back."""
    data = os.urandom(1 << 20)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(guest.PATIENCE)
        sock.connect(path)
        sock.sendall(b"CONNECT 52\n")
        line = b""
        while not line.endswith(b"\n"):
            byte = sock.recv(1)
            if not byte:
                return f"closed after {line}"
            line += byte
        if not line.startswith(b"OK "):
            return f"got {line}"

        def send():
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)

        threading.Thread(target=send, daemon=True).start()
        back = b""
        while chunk := sock.recv(65536):
            back += chunk
    return "" if back == data else f"{len(back)} bytes came back"


def vsock_refused(path):
    """Whether a port where the guest doesn't listen ends the connection."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(guest.PATIENCE)
        sock.connect(path)
        sock.sendall(b"CONNECT 53\n")
        return sock.recv(64) == b""


def user(cases, directory, tool):
    """One guest with user networking and vsock."""
    server = web.Server("127.0.0.1")
    forwarded, vsock, pcap = free_port(), os.path.join(directory, "v"), os.path.join(directory, "p")
    listener = answer_once(vsock + "_7000")
    vm = boot(os.path.join(directory, "user"), USER.replace("PORT", str(server.server_port)),
              "--net", f"user,hostfwd=tcp::{forwarded}-:80,mac=52:54:00:01:02:03,pcap={pcap}",
              "--vsock", f"cid=5,path={vsock}", programs=[tool])
    ready = server.waiting.wait(guest.PATIENCE)
    if cases.check("user-ready", ready, "the guest's script didn't get that far"):
        with urllib.request.urlopen(f"http://127.0.0.1:{forwarded}/mine", timeout=60) as reply:
            mine = reply.read()
        wrong = vsock_echo(vsock)
        cases.check("vsock-to-guest", not wrong, wrong)
        cases.check("vsock-refused", vsock_refused(vsock), "something answered")
    server.release.set()
    status = vm.finish()
    said = told(vm)
    cases.equal("user-power-off", status, 0)
    cases.equal("user-dhcp", said.get("address"), "10.0.2.15")
    cases.equal("user-mac", said.get("mac"), "52:54:00:01:02:03")
    cases.check("user-ping", "ping" in said, "no answer")
    cases.equal("user-download", said.get("down"), md5(server.blob))
    cases.equal("user-upload", md5(server.uploads.get("/upload", b"")), said.get("up"))
    cases.check("user-forward", ready and md5(mine) == said.get("up"), "it isn't the guest's file")
    cases.equal("vsock-from-guest", said.get("heard"), "HELLO FROM THE GUEST")
    cases.check("vsock-from-guest-refused", "nobody" in said, "the guest was connected")
    packets = captured(pcap)
    cases.check("user-capture", packets and sum(map(len, packets)) > 16 << 20, "not all packets")
    # By IP's source: large packets both ways, from the guest to be cut, and to it merged.
    large = {packet[26:30] for packet in packets or [] if len(packet) > 10000}
    cases.equal("user-offloads", sorted(large), [bytes([10, 0, 2, 2]), bytes([10, 0, 2, 15])])
    cases.check("vsock-socket-removed", not os.path.exists(vsock), "it is still there")
    listener.close()
    if cases.failed:
        vm.show()


def pair(cases, directory):
    """Two guests on a socket."""
    cable = os.path.join(directory, "cable")
    vms = [boot(os.path.join(directory, name), script, "--net", "socket=" + cable)
           for name, script in (("serve", SERVE), ("fetch", FETCH))]
    statuses = [vm.finish() for vm in reversed(vms)]
    cases.equal("pair-power-off", statuses, [0, 0])
    blobs = [told(vm).get("blob") for vm in vms]
    cases.check("pair-file", blobs[0] and blobs[0] == blobs[1], f"{blobs}")
    cases.check("pair-socket-removed", not os.path.exists(cable), "it is still there")
    if cases.failed:
        for vm in vms:
            vm.show()


def tap(cases, directory):
    """One guest at a tap interface that this process made in its namespace."""
    for command in ("ip tuntap add dev tap0 mode tap multi_queue",
                    "ip addr add 192.168.9.1/24 dev tap0", "ip link set tap0 mtu 1400 up"):
        subprocess.run(command.split(), check=True)
    server = web.Server("192.168.9.1")
    pcap = os.path.join(directory, "pcap")
    vm = boot(directory, TAP.replace("PORT", str(server.server_port)), "--net",
              f"tap=tap0,queues=2,pcap={pcap}")
    status = vm.finish()
    said = told(vm)
    cases.equal("tap-power-off", status, 0)
    cases.equal("tap-mtu", said.get("mtu"), "1400")
    cases.equal("tap-download", said.get("down"), md5(server.blob))
    cases.equal("tap-upload", md5(server.uploads.get("/upload", b"")), said.get("up"))
    # By IP's source: large packets both ways.
    large = {packet[26:30] for packet in captured(pcap) or [] if len(packet) > 4000}
    cases.equal("tap-offloads", sorted(large), [bytes([192, 168, 9, 1]), bytes([192, 168, 9, 2])])
    if cases.failed:
        vm.show()


def main():
    """Three parts."""
    cases = guest.Cases()
    with guest.temporary() as directory:
        if sys.argv[1] == "--in-namespace":
            tap(cases, directory)
            cases.done()
        user(cases, directory, os.path.abspath(sys.argv[1]))
        pair(cases, directory)
    namespace = ["unshare", "--user", "--map-root-user", "--net"]
    probe = subprocess.run([*namespace, "sh", "-c", "ip tuntap add dev tap0 mode tap"], check=False,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if probe.returncode:
        print("ok tap # skip this host lets us make no tap interface")
    else:
        inner = subprocess.run([*namespace, sys.executable, __file__, "--in-namespace"],
                               check=False)
        cases.failed += inner.returncode != 0
    cases.done()


main()
