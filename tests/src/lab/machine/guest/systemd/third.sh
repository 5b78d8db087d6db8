# After a shutdown without a network, behind rebooted.sh: the other disk is as it was, and attached again.
e2fsck -fp "$(volctl attach vol-2)"
volctl detach vol-2
