package bench

import (
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A datagram is as large as a short question, and so many are given to the kernel at once
// that the system call itself does not hide what a packet costs.
const (
	smallDatagram = 18
	datagramBatch = 32
)

// sink has datagrams arrive at an address, and none be kept: the kernel counts them.
func sink(address netip.AddrPort) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	none := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K}
	err = unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &none})
	if err != nil {
		return err
	}
	return unix.Bind(fd, &unix.SockaddrInet4{Port: int(address.Port()), Addr: address.Addr().As4()})
}

// arrived is how many datagrams a sink has refused in the namespace of a process (InErrors
// of Udp in net/snmp, proc_net(5)).
func arrived(pid int) int64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/snmp", pid))
	if err != nil {
		return 0
	}
	var heads []string
	for line := range strings.Lines(string(data)) {
		words := strings.Fields(line)
		if len(words) == 0 || words[0] != "Udp:" {
			continue
		}
		if heads == nil {
			heads = words
			continue
		}
		if i := slices.Index(heads, "InErrors"); i >= 0 && i < len(words) {
			count, _ := strconv.ParseInt(words[i], 10, 64)
			return count
		}
	}
	return 0
}

// mmsghdr is struct mmsghdr of sendmmsg(2).
type mmsghdr struct {
	header unix.Msghdr
	sent   uint32
	_      [4]byte
}

// measureDatagrams sends datagrams for the time it is given. Those that do not arrive are
// errors.
func (c *client) measureDatagrams(do command) (result outcome) {
	target := rawAddress(do.Targets[0])
	fd, _, errno := unix.RawSyscall(unix.SYS_SOCKET, unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if errno == 0 {
		defer closeSocket(fd)
		_, _, errno = unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&target)), unsafe.Sizeof(target))
	}
	if errno != 0 {
		result.note(errno, "connect by UDP")
		return result
	}
	vector := unix.Iovec{Base: &c.request[0], Len: smallDatagram}
	messages := make([]mmsghdr, datagramBatch)
	for i := range messages {
		messages[i].header.Iov, messages[i].header.Iovlen = &vector, 1
	}
	send := func() (unix.Errno, string) {
		for sent := uintptr(0); sent < datagramBatch; {
			n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, fd, uintptr(unsafe.Pointer(&messages[sent])), datagramBatch-sent, 0, 0, 0)
			if errno != 0 {
				return errno, "sendmmsg"
			}
			sent += n
		}
		return 0, ""
	}
	before := arrived(do.Server)
	c.repeat(do, &result, send)
	sent := int64(result.Count+do.WarmUp) * datagramBatch
	here := arrived(do.Server)
	for end := time.Now().Add(time.Second); here-before < sent && time.Now().Before(end); here = arrived(do.Server) {
		time.Sleep(100 * time.Microsecond)
	}
	if lost := sent - (here - before); lost != 0 {
		result.note(0, fmt.Sprintf("%d of %d datagrams arrived", here-before, sent))
	}
	result.Count *= datagramBatch
	result.P50, result.P99 = result.P50/datagramBatch, result.P99/datagramBatch
	return result
}

// streamWrite is what a stream gives to the kernel at once, in bytes.
const streamWrite = 64 << 10

// room is for what nobody looks at: all zeros of a stream, there and here.
var room [4 * streamWrite]byte

// measureStream writes to one connection for the time it is given, and waits until the
// server has read all of it. The processor time is that until then.
func (c *client) measureStream(do command) (result outcome) {
	target := rawAddress(do.Targets[0])
	fd, errno, step := open(&target)
	if step != "" {
		result.note(errno, step)
		return result
	}
	defer closeSocket(fd)
	c.request[0] = askSink
	cpu := processTime(0) + processTime(do.Server)
	if _, _, errno := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(&c.request)), messageSize); errno != 0 {
		result.note(errno, "write")
		return result
	}
	c.repeat(do, &result, func() (unix.Errno, string) {
		for sent := uintptr(0); sent < streamWrite; {
			n, _, errno := unix.RawSyscall(unix.SYS_WRITE, fd, uintptr(unsafe.Pointer(&room)), streamWrite-sent)
			if errno != 0 {
				return errno, "write"
			}
			sent += n
		}
		return 0, ""
	})
	if _, _, errno := unix.RawSyscall(unix.SYS_SHUTDOWN, fd, unix.SHUT_WR, 0); errno != 0 {
		result.note(errno, "shutdown")
	}
	result.note(toTheEnd(fd))
	result.CPU = processTime(0) + processTime(do.Server) - cpu
	return result
}

// swallow reads a stream to its end.
func swallow(fd uintptr) {
	for {
		n, _, errno := unix.RawSyscall(unix.SYS_READ, fd, uintptr(unsafe.Pointer(&room)), unsafe.Sizeof(room))
		if errno != 0 || n == 0 {
			return
		}
	}
}
