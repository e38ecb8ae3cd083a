#!/bin/busybox sh
# The first program of the machine that tests/kvm/nested.py boots: loads KVM, runs each test, and
# prints one line a case, as tests/run wants it. /plan says what there is to run:
#
#     boot CPUS             Debian's cloud kernel to a shell, which runs /script
#     guest FILE            one of our own guests
#     program NAME ARGS     a test program with cases of its own
#     auto                  --engine auto takes KVM
#     refuse                --engine kvm says what is missing, and has status 1
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
dmesg -n 1

for module in irqbypass kvm ccp kvm-amd; do
    insmod /modules/$module.ko || echo "not ok module-$module: it cannot be loaded"
done

# report NAME STATUS WANT: a case that a status decides; what was printed is shown when it failed.
report()
{
    if [ "$2" = "$3" ]; then
        echo "ok $1"
    else
        echo "not ok $1: status $2, want $3"
        tail -n 40 /tmp/out | sed 's/^/    | /'
    fi
}

boot()
{
    timeout 300 /doppel run --engine kvm --cpus "$1" --memory 192M --kernel /vmlinuz \
        --initrd /guest.cpio --append "console=ttyS0 quiet" --stats /tmp/stats \
        </dev/null >/tmp/out 2>&1
    report "boot-$1" $? 0
    grep -q "^guest: cpus=$1 .*sum=ok.*procs=ok" /tmp/out
    report "boot-$1-checks" $? 0
    grep -q '"port": [1-9]' /tmp/stats && grep -q '"engine": "kvm"' /tmp/stats
    report "boot-$1-stats" $? 0
}

guest()
{
    name=$(basename "$1" .elf)
    want=1
    case $name in shutdown*) want=3 ;; esac
    timeout 120 /doppel run --engine kvm --cpu max --kernel "$1" --debug-exit 0xf4 --no-reboot \
        </dev/null >/tmp/out 2>&1
    status=$?
    sed -n 's/\r$//; s/^\(ok\|not ok\) /\1 '"$name"': /p' /tmp/out
    report "$name-status" $status $want
}

program()
{
    timeout 600 "$@" >/tmp/out 2>&1
    status=$?
    grep -E '^(ok|not ok) ' /tmp/out
    report "$(basename "$1")-status" $status 0
}

# What QEMU translates for the first time is slower than any processor, so KVM may be refused once.
auto()
{
    for _ in 1 2 3 4 5; do
        DOPPEL_LOG=debug timeout 3 /doppel run --kernel /vmlinuz </dev/null >/tmp/out 2>&1
        grep -q 'debug: engine kvm$' /tmp/out && break
    done
    grep -q 'debug: engine kvm$' /tmp/out
    report auto-takes-kvm $? 0
}

# refused NAME WORD: --engine kvm ends with status 1 and one line, which holds WORD.
refused()
{
    timeout 60 /doppel run --engine kvm --kernel /vmlinuz </dev/null >/tmp/out 2>&1
    report "$1-status" $? 1
    [ "$(wc -l </tmp/out)" = 1 ] && grep -q "$2" /tmp/out
    report "$1-says-why" $? 0
}

refuse()
{
    mv /dev/kvm /dev/kvm.away
    refused no-kvm 'no /dev/kvm'
    ln -s null /dev/kvm
    refused not-kvm /dev/kvm
    rm /dev/kvm
    mv /dev/kvm.away /dev/kvm
}

while read -r line; do
    # shellcheck disable=SC2086 # the words of the line
    $line
done </plan
echo "inside: done"
echo o >/proc/sysrq-trigger
sleep 60
