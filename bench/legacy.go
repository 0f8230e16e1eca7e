package bench

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// legacyInfo is struct ipt_getinfo (linux/netfilter_ipv4/ip_tables.h), what the
// kernel says of a table of iptables-legacy.
type legacyInfo struct {
	name                [32]byte
	_                   uint32 // the hooks the table is on
	hookEntry, underrun [5]uint32
	entries, size       uint32
}

// getInfo is IPT_SO_GET_INFO of the same header.
const getInfo = 64

// legacyTables is how many bytes the rules of iptables-legacy take in the kernel:
// the size of each table, which is one piece of memory. Counters for each
// processor, 16 bytes a rule and processor, come on top and are not in it.
func legacyTables(namespace string) (bytes uint64, err error) {
	err = netns.Do(namespace, func() error {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_RAW)
		if err != nil {
			return fmt.Errorf("open socket: %w", err)
		}
		defer unix.Close(fd)
		for _, table := range []string{"mangle", "filter", "nat"} {
			var info legacyInfo
			copy(info.name[:], table)
			length := uint32(unsafe.Sizeof(info))
			_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), unix.IPPROTO_IP, getInfo,
				uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&length)), 0)
			if errno != 0 {
				return fmt.Errorf("ask for the size of iptables table %s: %w", table, errno)
			}
			bytes += uint64(info.size)
		}
		return nil
	})
	return bytes, err
}
