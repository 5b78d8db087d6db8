set -eux
# The file system of the first boot is mounted, with what was written; with `nofail` nothing waits for it.
for _ in $(seq 120); do
    ! findmnt /mnt/data || break
    sleep 1
done
cmp <(yes volnode | head -c 3000000) /mnt/data/file
[ -z "$(systemctl --failed --no-legend)" ]
