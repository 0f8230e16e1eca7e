package lab

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// checkPrivileges tells in one sentence what is missing, before anything is
// made that would have to be taken down again (capabilities(7)).
func checkPrivileges() error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return fmt.Errorf("read capabilities: %w", err)
	}
	var missing []string
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}} {
		if data[0].Effective&(1<<c.bit) == 0 {
			missing = append(missing, c.name)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%w: a lab makes network namespaces and links and needs %s: run it as root", ErrPrivilege, strings.Join(missing, " and "))
	}
	return nil
}
