package nft

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/bits"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

// legacy lists the tables of iptables-legacy that hold rules: what these do is
// not read.
func (n *Net) legacy() (uses []Use, err error) {
	read := func() error {
		for _, f := range []struct {
			name, file    string
			domain, level int
		}{{"ip", "ip_tables_names", unix.AF_INET, unix.SOL_IP}, {"ip6", "ip6_tables_names", unix.AF_INET6, unix.SOL_IPV6}} {
			names, err := os.ReadFile("/proc/thread-self/net/" + f.file)
			if errors.Is(err, fs.ErrNotExist) {
				continue // this kernel, or this namespace, has none
			}
			if err != nil {
				return fmt.Errorf("read tables of iptables-legacy: %w", err)
			}
			for _, table := range strings.Fields(string(names)) {
				if holdsRules(f.domain, f.level, table) {
					uses = append(uses, Use{Family: f.name, Table: table, What: "is iptables-legacy's, whose rules cannot be read"})
				}
			}
		}
		return nil
	}
	err = netns.In(n.path, read)
	return uses, err
}

// tableInfo is struct ipt_getinfo of linux/netfilter_ipv4/ip_tables.h, which
// ip6t_getinfo equals.
type tableInfo struct {
	name      [32]byte
	hooks     uint32 // bits: the built-in chains there are
	entries   [5]uint32
	underflow [5]uint32
	count     uint32 // of all entries
	size      uint32
}

// holdsRules says whether there is more in a table than the policies of its
// chains and its end. What cannot be told counts as rules.
func holdsRules(domain, level int, table string) bool {
	const getInfo = 64                                                   // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // a raw one takes CAP_NET_RAW
	if err != nil {
		return true
	}
	defer unix.Close(fd)
	var info tableInfo
	copy(info.name[:], table)
	size := uint32(unsafe.Sizeof(info))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), getInfo,
		uintptr(unsafe.Pointer(&info)), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 || !bytes.HasPrefix(info.name[:], []byte(table)) {
		return true
	}
	return int(info.count) > bits.OnesCount32(info.hooks)+1
}

// LegacyHolds lists the tables of iptables-legacy that have a chain of this name, as
// in "ip nat". They can be read here, but not written.
func (n *Net) LegacyHolds(chain string) (tables []string, err error) {
	uses, err := n.legacy()
	if err != nil || len(uses) == 0 {
		return nil, err
	}
	read := func() error {
		for _, use := range uses {
			domain, level := unix.AF_INET, unix.SOL_IP
			if use.Family == "ip6" {
				domain, level = unix.AF_INET6, unix.SOL_IPV6
			}
			holds, err := holdsChain(domain, level, use.Table, chain)
			if err != nil {
				return fmt.Errorf("read table %s %s of iptables-legacy: %w", use.Family, use.Table, err)
			}
			if holds {
				tables = append(tables, use.Family+" "+use.Table)
			}
		}
		return nil
	}
	err = netns.In(n.path, read)
	return tables, err
}

// holdsChain says whether a table has a chain: its entries hold the name where the
// chain begins (struct xt_error_target of linux/netfilter/x_tables.h). Rules that
// jump hold an offset.
func holdsChain(domain, level int, table, chain string) (bool, error) {
	const getInfo, getEntries = 64, 65                                   // IPT_SO_GET_INFO and _ENTRIES, IP6T_SO_*
	const headerLength = 40                                              // struct ipt_get_entries: name, size, alignment
	fd, err := unix.Socket(domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // a raw one takes CAP_NET_RAW
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	ask := func(what int, into []byte) error {
		size := uint32(len(into))
		_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(what),
			uintptr(unsafe.Pointer(&into[0])), uintptr(unsafe.Pointer(&size)), 0)
		if errno != 0 {
			return errno
		}
		return nil
	}
	const tries = 5 // somebody may change the table in between: EAGAIN
	for range tries {
		var info tableInfo
		copy(info.name[:], table)
		header := unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info))
		if err := ask(getInfo, header); err != nil {
			return false, err
		}
		entries := make([]byte, headerLength+int(info.size))
		copy(entries, table)
		host.PutUint32(entries[len(info.name):], info.size)
		if err = ask(getEntries, entries); err == nil {
			return bytes.Contains(entries, append([]byte(chain), 0)), nil
		}
		if !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	return false, err
}
