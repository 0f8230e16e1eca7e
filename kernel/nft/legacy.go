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

// legacyFamilies are the two kinds of tables.
var legacyFamilies = []tables4And6{
	{"ip", "ip_tables_names", unix.NFPROTO_IPV4, unix.AF_INET, unix.SOL_IP, 4, 16, 80, 82, 83, 88, 90, 96, 112, 8, 16},
	{"ip6", "ip6_tables_names", unix.NFPROTO_IPV6, unix.AF_INET6, unix.SOL_IPV6, 16, 64, 128, 131, 132, 140, 142, 152, 168, 8, 16},
}

// eachLegacy calls f with every table of iptables-legacy, inside the namespace.
func (n *Net) eachLegacy(f func(family *tables4And6, table string) error) error {
	return netns.In(n.path, func() error {
		for i := range legacyFamilies {
			family := &legacyFamilies[i]
			names, err := os.ReadFile("/proc/thread-self/net/" + family.file)
			if errors.Is(err, fs.ErrNotExist) {
				continue // this kernel, or this namespace, has none
			}
			if err != nil {
				return fmt.Errorf("read tables of iptables-legacy: %w", err)
			}
			for _, table := range strings.Fields(string(names)) {
				if err := f(family, table); err != nil {
					return fmt.Errorf("read table %s %s of iptables-legacy: %w", family.name, table, err)
				}
			}
		}
		return nil
	})
}

// legacy lists the tables of iptables-legacy that hold rules: what these do is
// not read.
func (n *Net) legacy() (uses []Use, err error) {
	err = n.eachLegacy(func(f *tables4And6, table string) error {
		if f.holdsRules(table) {
			uses = append(uses, Use{Family: f.name, Table: table, What: "is iptables-legacy's, whose rules cannot be read"})
		}
		return nil
	})
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
func (f *tables4And6) holdsRules(table string) bool {
	s, err := f.dial()
	if err != nil {
		return true
	}
	defer s.close()
	info, err := s.info(table)
	if err != nil || !bytes.HasPrefix(info.name[:], []byte(table)) {
		return true
	}
	return int(info.count) > bits.OnesCount32(info.hooks)+1
}

// LegacyHolds lists the tables of iptables-legacy that hold rules and have a chain of
// this name, as in "ip nat". They can be read here, but not written.
func (n *Net) LegacyHolds(chain string) (tables []string, err error) {
	err = n.eachLegacy(func(f *tables4And6, table string) error {
		if !f.holdsRules(table) {
			return nil
		}
		_, entries, err := f.entries(table)
		// An entry holds the name where the chain begins (struct xt_error_target of
		// linux/netfilter/x_tables.h). Rules that jump hold an offset.
		if bytes.Contains(entries, append([]byte(chain), 0)) {
			tables = append(tables, f.name+" "+table)
		}
		return err
	})
	return tables, err
}

// entries reads one table whole.
func (f *tables4And6) entries(table string) (info tableInfo, entries []byte, err error) {
	s, err := f.dial()
	if err != nil {
		return info, nil, err
	}
	defer s.close()
	const getEntries, headerLength = 65, 40 // IPT_SO_GET_ENTRIES; struct ipt_get_entries: name, size, alignment
	const tries = 5                         // somebody may change the table in between: EAGAIN
	for range tries {
		if info, err = s.info(table); err != nil {
			return info, nil, err
		}
		entries = make([]byte, headerLength+int(info.size))
		copy(entries, table)
		host.PutUint32(entries[len(info.name):], info.size)
		if err = s.ask(getEntries, entries); !errors.Is(err, unix.EAGAIN) {
			break
		}
	}
	if err != nil {
		return info, nil, err
	}
	return info, entries[headerLength:], nil
}

// legacySocket is by which the kernel is asked about tables of one kind.
type legacySocket struct{ fd, level int }

func (f *tables4And6) dial() (legacySocket, error) {
	fd, err := unix.Socket(f.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0) // a raw one takes CAP_NET_RAW
	return legacySocket{fd, f.level}, err
}

func (s legacySocket) close() { unix.Close(s.fd) }

// ask is getsockopt() with a structure that says what is meant.
func (s legacySocket) ask(what int, into []byte) error {
	size := uint32(len(into))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(s.fd), uintptr(s.level), uintptr(what),
		uintptr(unsafe.Pointer(&into[0])), uintptr(unsafe.Pointer(&size)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func (s legacySocket) info(table string) (info tableInfo, err error) {
	const getInfo = 64 // IPT_SO_GET_INFO, IP6T_SO_GET_INFO
	copy(info.name[:], table)
	return info, s.ask(getInfo, unsafe.Slice((*byte)(unsafe.Pointer(&info)), unsafe.Sizeof(info)))
}
