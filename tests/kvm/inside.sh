#!/bin/busybox sh
# The first program of the machine that tests/kvm/nested.py boots: loads KVM, runs each test, and
# prints one line a case, as tests/run wants it. /plan says what there is to run:
#
#     boot CPUS             Debian's cloud kernel to a shell, which runs /script
#     devices CPUS          the same with a virtio disk and a user network
#     nested                the same with --cpu host,nested=on
#     start                 CPU time and memory that a machine takes, beside QEMU's microvm
#     memory                the kinds of memory that --memory offers
#     exits                 what leaving the guest costs on every engine
#     guest FILE CPUS       one of our own guests, on every engine
#     program NAME ARGS     a test program with cases of its own
#     oracle OPTION...      random instructions, beside the processor that is below KVM
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
        tail -n 40 /tmp/out | sed '/^ok /d; s/^/    | /'
    fi
}

# linux OPTION...: Debian's kernel runs its script; what it says is in /tmp/out.
linux()
{
    timeout 300 /doppel run --engine kvm --kernel /vmlinuz --append "console=ttyS0 quiet" \
        --stats /tmp/stats "$@" </dev/null >/tmp/out 2>&1
}

boot()
{
    linux --cpus "$1" --memory 128M --initrd /guest.cpio
    report "boot-$1" $? 0
    grep -q "^guest: cpus=$1 .*sum=ok.*procs=ok" /tmp/out
    report "boot-$1-checks" $? 0
    grep -q '"port": [1-9]' /tmp/stats && grep -q '"engine": "kvm"' /tmp/stats
    report "boot-$1-stats" $? 0
    own=$((($(stat resident_bytes) - $(stat guest_resident_bytes)) / 1024))
    [ $own -le $((5 * 1024)) ]
    report "boot-$1-memory" $? 0
    echo "boot-$1: $own KiB beside the guest's memory"
}

nested()
{
    linux --cpu host,nested=on --memory 128M --initrd /guest.cpio
    report nested $? 0
    grep -q "^guest: .*sum=ok.* svm=1" /tmp/out
    report nested-svm $? 0
    linux --cpu host --memory 128M --initrd /guest.cpio
    grep -q "^guest: .*sum=ok.* svm=0" /tmp/out
    report nested-off $? 0
}

# stat NAME: a whole number of the last run's statistics.
stat()
{
    sed -n 's/^ *"'"$1"'": \([0-9]*\),*$/\1/p' /tmp/stats | head -n 1
}

# cpu_of COMMAND...: its CPU time in hundredths of a second; much, when it hangs.
cpu_of()
{
    time -f 'cpu %U %S' timeout 60 "$@" 2>&1 >/dev/null </dev/null |
        awk -v what="$1" '/terminated by signal/ { hung = 1; print what " hung" >"/dev/stderr" }
            /^cpu/ { printf "%d", hung ? 10000 : 100 * ($2 + $3) }'
}

# least A B: the smaller one.
least()
{
    if [ "$1" -lt "$2" ]; then echo "$1"; else echo "$2"; fi
}

# compare NAME FILE: what both take for a kernel that ends with its first instructions. The least of some runs, in turns:
# what QEMU translates for the first time is slow, and so is all of it while its host is busy.
compare()
{
    mine=10000
    theirs=10000
    for _ in 1 2 3 4 5; do
        mine=$(least "$mine" "$(cpu_of /doppel run --engine kvm --memory 128M --kernel "$2" --no-reboot)")
        theirs=$(least "$theirs" "$(cpu_of /qemu -M microvm -accel kvm -cpu host -m 128M -nodefaults \
            -no-user-config -display none -serial stdio -no-reboot -kernel "$2")")
    done
    [ "$mine" -gt 0 ] && [ "$mine" -lt "$theirs" ]
    report "$1-cpu" $? 0
    echo "$1: $mine hundredths of a second of CPU time, QEMU's microvm $theirs"
}

start()
{
    compare start-elf /start.elf
    compare start-bzimage /start.bz
}

# Memory of each kind that the option asks for, under a guest that ends at once; without huge pages it can't have them.
memory()
{
    run="timeout 60 /doppel run --engine kvm --kernel /start.elf --no-reboot --memory 16M"
    $run,hugepages=on </dev/null >/tmp/out 2>&1
    report memory-no-huge-pages $? 1
    grep -q 'vm.nr_hugepages' /tmp/out
    report memory-no-huge-pages-says-why $? 0
    echo 16 >/proc/sys/vm/nr_hugepages
    for option in hugepages locked mergeable hugepages=on,locked; do
        $run,$option=on </dev/null >/tmp/out 2>&1
        report "memory-$option" $? 3
    done
    echo 0 >/proc/sys/vm/nr_hugepages
}

exits()
{
    for engine in kvm bt interp; do
        timeout 120 /doppel run --engine $engine --cpus 2 --kernel /exits64.elf --debug-exit 0xf4 \
            </dev/null >/tmp/out 2>&1
        report "exits-$engine" $? 1
        sed -n 's/\r$//; s/^\([a-z-]*\) 0x\([0-9a-f]*\)$/\1 \2/p' /tmp/out | while read -r what cycles; do
            echo "exits: $engine $what $((0x$cycles))"
        done
    done
}

# The guest fetches a file from a server here and writes it to the disk.
devices()
{
    mkdir -p /tmp/www
    head -c 2097152 /dev/urandom >/tmp/www/blob
    truncate -s 4M /tmp/disk /tmp/other
    ip link set lo up
    pidof httpd >/dev/null || httpd -p 127.0.0.1:8080 -h /tmp/www
    linux --cpus "$1" --memory 192M --initrd /devices.cpio --disk /tmp/disk,format=raw \
        --disk /tmp/other,format=raw --net user
    report "devices-$1" $? 0
    grep -q "^guest: address 10.0.2.15" /tmp/out
    report "devices-$1-network" $? 0
    [ "$(md5sum </tmp/www/blob)" = "$(head -c 2097152 /tmp/disk | md5sum)" ]
    report "devices-$1-disk" $? 0
    # Notifications don't leave the kernel: there were more of them than of all MMIO exits.
    requests=$(sed -n 's/^guest: requests //p' /tmp/out)
    [ "${requests:-0}" -gt 2000 ] && [ "$(stat mmio)" -lt "$requests" ]
    report "devices-$1-doorbells" $? 0
    # Their interrupts are sent by eventfds: two disks and a network, each with a vector for every queue that was used.
    [ "$(stat irqfds)" -ge 4 ]
    report "devices-$1-irqfds" $? 0
    echo "devices-$1: $requests requests, $(stat mmio) MMIO exits, $(stat irqfds) irqfds"
}

# Other engines' checks go to nested.py, which compares them.
guest()
{
    name=$(basename "$1" .elf)
    want=1
    case $name in shutdown*) want=3 ;; esac
    for engine in kvm bt interp; do
        prefix=
        [ $engine = kvm ] || prefix="on $engine: "
        timeout 120 /doppel run --engine $engine --cpu max --cpus "$2" --kernel "$1" --debug-exit 0xf4 \
            --no-reboot </dev/null >/tmp/out 2>&1
        status=$?
        sed -n 's/\r$//; s/^\(ok\|not ok\) /'"$prefix"'\1 '"$name"': /p' /tmp/out
        if [ $engine = kvm ]; then
            report "$name-status" $status $want
        else
            echo "on $engine: end $name"
        fi
    done
}

program()
{
    {
        timeout 900 "$@" 2>&1
        echo $? >/tmp/status
    } | tee /tmp/out | grep -E '^(ok|not ok) '
    report "$(basename "$1")-status" "$(cat /tmp/status)" 0
}

# Random instructions give under kvm what they give on the processor that KVM has.
oracle()
{
    program /oracle --engine kvm "$@" /oracle_native
}

# What QEMU translates for the first time is slower than any processor, and so is a QEMU whose host is
# busy: KVM may be refused for that, now and then or every time.
auto()
{
    for _ in 1 2 3 4 5 6 7 8; do
        DOPPEL_LOG=debug timeout 3 /doppel run --kernel /start.elf --no-reboot </dev/null >/tmp/out 2>&1
        grep -q "engine kvm can't run here: KVM hangs\|engine kvm can't run here: .* times slower" \
            /tmp/out || break
    done
    if grep -q "engine kvm can't run here: KVM hangs\|times slower" /tmp/out; then
        echo "ok auto-takes-kvm # skip QEMU's host is too busy"
        return
    fi
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
    echo "inside: begin $line"
    # shellcheck disable=SC2086 # the words of the line
    $line
done </plan
echo "inside: done"
echo o >/proc/sysrq-trigger
sleep 60
