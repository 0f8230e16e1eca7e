// Package proc reads the texts in which the kernel tells its counters: those of
// protocols, of connection tracking, of processors and of UDP sockets.
//
// It is given the texts, opens no file, and writes nothing. A look-up costs a few
// microseconds, which is why none of them is kept.
package proc

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Counter is a number of /proc/net/netstat or /proc/net/snmp, by the names of its
// group and itself: "TcpExt.ListenOverflows".
func Counter(text, name string) (n uint64, err error) {
	err = fmt.Errorf("no counter %s", name)
	wanted, column, _ := strings.Cut(name, ".")
	groups(text, func(group string, names, numbers []string) {
		if at := slices.Index(names, column); group == wanted && at >= 0 && at < len(numbers) {
			n, err = strconv.ParseUint(numbers[at], 10, 64)
		}
	})
	return n, err
}

// Counters calls f with every number of /proc/net/netstat or /proc/net/snmp, by the name
// that Counter knows it by. What does not count is left out: Tcp.MaxConn is -1.
func Counters(text string, f func(name string, n uint64)) {
	groups(text, func(group string, names, numbers []string) {
		for i, name := range names[:min(len(names), len(numbers))] {
			if n, err := strconv.ParseUint(numbers[i], 10, 64); err == nil {
				f(group+"."+name, n)
			}
		}
	})
}

// groups reads /proc/net/netstat or /proc/net/snmp: each group has a line of names and,
// after it, one of numbers.
func groups(text string, f func(group string, names, numbers []string)) {
	var of string
	var names []string
	for line := range strings.Lines(text) {
		group, rest, _ := strings.Cut(line, ": ")
		fields := strings.Fields(rest)
		if names == nil || group != of {
			of, names = group, fields
			continue
		}
		f(group, names, fields)
		names = nil
	}
}

// Line is the number behind a name at the start of a line, as /proc/net/snmp6 and
// cgroups' cpu.stat have them.
func Line(text, name string) (uint64, error) {
	for line := range strings.Lines(text) {
		if fields := strings.Fields(line); len(fields) == 2 && fields[0] == name {
			return strconv.ParseUint(fields[1], 10, 64)
		}
	}
	return 0, fmt.Errorf("no counter %s", name)
}

// PerCPU is the column of a table of /proc/net/stat, which has a line of names and a
// line of hexadecimal numbers for each processor. They are added up, but for
// "entries", which each line has whole.
func PerCPU(text, name string) (sum uint64, err error) {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	at := slices.Index(strings.Fields(lines[0]), name)
	if at < 0 || len(lines) < 2 {
		return 0, fmt.Errorf("no counter %s", name)
	}
	for _, line := range lines[1:] {
		n, err := hexField(strings.Fields(line), at)
		if err != nil {
			return 0, fmt.Errorf("counter %s: %w", name, err)
		}
		if name == "entries" {
			return n, nil
		}
		sum += n
	}
	return sum, nil
}

// The columns of /proc/net/softnet_stat that are meant here (net/core/net-procfs.c);
// newer kernels have more of them.
const (
	SoftnetDropped  = 1
	SoftnetSqueezed = 2
)

// Softnet adds up a column of /proc/net/softnet_stat, a line for each processor.
func Softnet(text string, column int) (sum uint64, err error) {
	for line := range strings.Lines(text) {
		n, err := hexField(strings.Fields(line), column)
		if err != nil {
			return 0, fmt.Errorf("column %d: %w", column, err)
		}
		sum += n
	}
	return sum, nil
}

func hexField(fields []string, at int) (uint64, error) {
	if at >= len(fields) {
		return 0, fmt.Errorf("a line has %d fields", len(fields))
	}
	return strconv.ParseUint(fields[at], 16, 64)
}

// Sockstat is a number of /proc/net/sockstat: "TCP.inuse".
func Sockstat(text, name string) (uint64, error) {
	group, word, _ := strings.Cut(name, ".")
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) == 0 || fields[0] != group+":" {
			continue
		}
		if at := slices.Index(fields, word); at > 0 && at+1 < len(fields) {
			return strconv.ParseUint(fields[at+1], 10, 64)
		}
	}
	return 0, fmt.Errorf("no counter %s", name)
}

// Times are what processors have done, in ticks since they started (proc_stat(5)).
type Times struct{ Busy, Idle, SoftIRQ, Steal uint64 }

// Total is the time that has passed.
func (t Times) Total() uint64 { return t.Busy + t.Idle }

// CPUs reads /proc/stat: one for each line whose name is "cpu", which stands for all,
// or "cpu0" and so on.
func CPUs(text string) (map[string]Times, error) {
	all := map[string]Times{}
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 9 || !strings.HasPrefix(fields[0], "cpu") {
			continue
		}
		var n [8]uint64 // user nice system idle iowait irq softirq steal; what follows is in user already
		for i := range n {
			var err error
			if n[i], err = strconv.ParseUint(fields[i+1], 10, 64); err != nil {
				return nil, fmt.Errorf("line %s: %w", fields[0], err)
			}
		}
		all[fields[0]] = Times{Busy: n[0] + n[1] + n[2] + n[5] + n[6] + n[7], Idle: n[3] + n[4], SoftIRQ: n[6], Steal: n[7]}
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("no line of a processor")
	}
	return all, nil
}

// Device is what a network device has counted (/proc/net/dev).
type Device struct{ Received, ReceiveErrors, ReceiveDrops, Sent, SendErrors, SendDrops uint64 }

// Devices reads /proc/net/dev, by the names of the devices.
func Devices(text string) (map[string]Device, error) {
	all := map[string]Device{}
	for line := range strings.Lines(text) {
		name, rest, found := strings.Cut(line, ":")
		fields := strings.Fields(rest)
		if !found || len(fields) < 12 {
			continue // the two lines of the heading
		}
		var n [12]uint64
		for i := range n {
			var err error
			if n[i], err = strconv.ParseUint(fields[i], 10, 64); err != nil {
				return nil, fmt.Errorf("device %s: %w", strings.TrimSpace(name), err)
			}
		}
		all[strings.TrimSpace(name)] = Device{n[1], n[2], n[3], n[9], n[10], n[11]}
	}
	return all, nil
}

// Socket is a line of /proc/net/tcp, tcp6, udp or udp6.
type Socket struct {
	Local, Remote netip.AddrPort
	// State is that of TCP: 1 is established, 10 listens.
	State uint64
	// Inode is 0 for a connection that no process holds.
	Inode uint64
	// Drops counts what a UDP socket had no room for.
	Drops uint64
}

// Sockets reads /proc/net/tcp, tcp6, udp or udp6. It calls f with each socket, since
// there may be very many.
func Sockets(text string, f func(Socket)) error {
	for line := range strings.Lines(text) {
		fields := strings.Fields(line)
		if len(fields) < 10 || fields[0] == "sl" {
			continue
		}
		local, err := hexAddress(fields[1])
		if err != nil {
			return err
		}
		remote, err := hexAddress(fields[2])
		if err != nil {
			return err
		}
		s := Socket{Local: local, Remote: remote}
		if s.State, err = strconv.ParseUint(fields[3], 16, 8); err != nil {
			return fmt.Errorf("state of %s: %w", local, err)
		}
		if s.Inode, err = strconv.ParseUint(fields[9], 10, 64); err != nil {
			return fmt.Errorf("inode of %s: %w", local, err)
		}
		if len(fields) == 13 { // UDP alone has this number of fields
			if s.Drops, err = strconv.ParseUint(fields[12], 10, 64); err != nil {
				return fmt.Errorf("drops of %s: %w", local, err)
			}
		}
		f(s)
	}
	return nil
}

// hexAddress reads "0100007F:0035": words of 32 bits in the machine's order, which is
// little endian wherever this program runs, and a port.
func hexAddress(text string) (netip.AddrPort, error) {
	host, port, _ := strings.Cut(text, ":")
	raw, err := hex.DecodeString(host)
	if err != nil || len(raw)%4 != 0 {
		return netip.AddrPort{}, fmt.Errorf("read address %q", text)
	}
	for i := 0; i < len(raw); i += 4 {
		slices.Reverse(raw[i : i+4])
	}
	addr, ok := netip.AddrFromSlice(raw)
	number, err := strconv.ParseUint(port, 16, 16)
	if !ok || err != nil {
		return netip.AddrPort{}, fmt.Errorf("read address %q", text)
	}
	return netip.AddrPortFrom(addr.Unmap(), uint16(number)), nil
}
