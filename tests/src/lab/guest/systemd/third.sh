# After a shutdown without a network: everything is as it was, and attached again.
set -eux
# With `nofail` nothing waits for it.
for _ in $(seq 120); do
    ! findmnt /mnt/data || break
    sleep 1
done
cmp <(yes volnode | head -c 3000000) /mnt/data/file
[ -z "$(systemctl --failed --no-legend)" ]
e2fsck -fp "$(volctl attach vol-2)"
volctl detach vol-2
