# What a guest checks of the machine below it. Runs in the guest as /script; each case prints
# "check: NAME ok" or "check: NAME FAILED", and the host reads that (tests/guest/boot.py).

check() {
    if [ "$2" = "$3" ]; then
        echo "check: $1 ok"
    else
        echo "check: $1 FAILED: got '$2', want '$3'"
    fi
}

# File system
mkdir -p /tmp/d/e
seq 1 20000 >/tmp/d/numbers
cp /tmp/d/numbers /tmp/d/e/copy
mv /tmp/d/e/copy /tmp/d/e/moved
ln -s ../numbers /tmp/d/e/link
check file-copy "$(cmp /tmp/d/e/link /tmp/d/e/moved && echo same)" same
check file-size "$(stat -c %s /tmp/d/numbers)" 108894
check file-find "$(find /tmp/d -type f | sort | tr '\n' ' ')" "/tmp/d/e/moved /tmp/d/numbers "
dd if=/dev/zero of=/tmp/d/zero bs=64k count=64 2>/dev/null
check file-zeroes "$(tr -d '\000' </tmp/d/zero | wc -c)" 0
rm -r /tmp/d
check file-remove "$(ls /tmp)" ""

# Pipes
check pipe-sort "$(seq 1 20000 | sort -rn | sed -n '1p;$p' | tr '\n' ' ')" "20000 1 "
mkfifo /tmp/fifo
seq 1 20000 >/tmp/fifo &
check pipe-fifo "$(wc -l </tmp/fifo)" 20000
wait

# Signals
trap 'caught=yes' USR1
caught=no
kill -USR1 $$
check signal-trap "$caught" yes
sleep 100 &
kill -TERM $!
wait $!
check signal-term $? 143
timeout 1 sleep 100
check signal-timeout $? 143
sh -c 'kill -SEGV $$' 2>/dev/null
check signal-segv $? 139

# Processes
check process-many "$(for i in $(seq 1 50); do (echo $i) & done | wc -l; wait)" 50

# Integers and floating point
check integer "$((0x7fffffffffffffff / 1234567)) $((987654321 * 123456789 % 1000000007))" \
    "7470936803636 259106859"
check float-sqrt \
    "$(awk 'BEGIN { x = 1; for (i = 0; i < 8; i++) x = (x + 2 / x) / 2; printf "%.15f", x }')" \
    1.414213562373095
check float-exp \
    "$(awk 'BEGIN { t = e = 1; for (i = 1; i < 25; i++) { t /= i; e += t } printf "%.14f", e }')" \
    2.71828182845905
check float-sum \
    "$(awk 'BEGIN { for (i = 1; i <= 20000; i++) s += 1 / (i * i); printf "%.12f", s }')" \
    1.644884068098

# Known data
check sha256-abc "$(printf abc | sha256sum | cut -c1-64)" \
    ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad
check sha256-numbers "$(seq 1 20000 | sha256sum | cut -c1-64)" f6351f5ead9a700e34275480b3856ea738122a7c57bdeb744a631251c069587a
check gzip "$(seq 1 20000 | gzip | gunzip | sha256sum | cut -c1-64)" f6351f5ead9a700e34275480b3856ea738122a7c57bdeb744a631251c069587a

# The machine
check processors "$(nproc)" 1
check rtc "$(hwclock -r >/dev/null && echo read)" read
check interrupts "$(awk '/ttyS0/ && $2 > 0 { print "counted" }' /proc/interrupts)" counted
check kernel-log \
    "$(dmesg | grep -E 'WARNING:|BUG|Call Trace|Oops|unchecked MSR|stall|lockup|ACPI.*(Error|Warning)|[Uu]nstable|nobody cared|disabled? irq' | head -n 3)" ""
# The machine has no PCI, and Linux calls that fatal.
check kernel-errors \
    "$(dmesg -r | grep -E '^<[0-3]>' | grep -v 'PCI: Fatal: No config space access' | head -n 3)" ""

# The host takes the time between these two lines, and compares.
echo "clock: $(cut -d' ' -f1 /proc/uptime) $(date +%s)"
sleep 5
echo "clock: $(cut -d' ' -f1 /proc/uptime) $(date +%s)"
exit 0
