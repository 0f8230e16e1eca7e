package link

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

var host = binary.NativeEndian

// of linux/ethtool.h
const (
	getStrings   = 0x1b // ETHTOOL_GSTRINGS
	getStats     = 0x1d // ETHTOOL_GSTATS
	getSetInfo   = 0x37 // ETHTOOL_GSSET_INFO
	setStats     = 1    // ETH_SS_STATS
	stringLength = 32   // ETH_GSTRING_LEN
	mostStats    = 4096
)

// request is struct ifreq with a pointer in it.
type request struct {
	name [unix.IFNAMSIZ]byte
	data unsafe.Pointer
	_    [16]byte
}

// Counters are a device's own (ethtool -S), of the calling thread's network namespace:
// "rx_queue_0_xdp_drops". A device without any has none, without an error.
func Counters(device string) (map[string]uint64, error) {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("read counters of %s: make a socket: %w", device, err)
	}
	defer unix.Close(fd)
	ask := func(data []byte) error {
		r := request{data: unsafe.Pointer(&data[0])}
		copy(r.name[:unix.IFNAMSIZ-1], device)
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r)))
		if errno != 0 {
			return errno
		}
		return nil
	}
	info := make([]byte, 20) // struct ethtool_sset_info: cmd, reserved, mask of 64 bits, a number
	host.PutUint32(info, getSetInfo)
	host.PutUint64(info[8:], 1<<setStats)
	if err := ask(info); err != nil || host.Uint64(info[8:]) == 0 {
		return nil, nil // it has none
	}
	count := int(host.Uint32(info[16:]))
	if count == 0 || count > mostStats {
		return nil, nil
	}
	// The kernel writes as many as there are, which may be more by now.
	room := 2*count + 64
	names, values := make([]byte, 12+room*stringLength), make([]byte, 8+room*8)
	host.PutUint32(names, getStrings)
	host.PutUint32(names[4:], setStats)
	host.PutUint32(names[8:], uint32(count))
	host.PutUint32(values, getStats)
	host.PutUint32(values[4:], uint32(count))
	for _, b := range [][]byte{names, values} {
		if err := ask(b); err != nil {
			return nil, fmt.Errorf("read counters of %s: %w", device, err)
		}
	}
	counters := make(map[string]uint64, count)
	for i := range count {
		name, _, _ := bytes.Cut(names[12+i*stringLength:12+(i+1)*stringLength], []byte{0})
		counters[string(name)] = host.Uint64(values[8+8*i:])
	}
	return counters, nil
}
