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
	ask := func(data []byte) error { return askDevice(fd, device, data) }
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

func askDevice(fd int, device string, data []byte) error {
	r := request{data: unsafe.Pointer(&data[0])}
	copy(r.name[:unix.IFNAMSIZ-1], device)
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.SIOCETHTOOL, uintptr(unsafe.Pointer(&r)))
	if errno != 0 {
		return errno
	}
	return nil
}

// Offload is what a device, or the kernel for it, does with packets that are longer than
// its MTU. Its value is the order of linux/ethtool.h that sets it.
type Offload uint32

// The offloads (ethtool -K): TSO and GSO are that a device takes such packets, GRO that what
// comes is put together to such.
const (
	TSO Offload = 0x1f // ETHTOOL_STSO
	GSO Offload = 0x24 // ETHTOOL_SGSO
	GRO Offload = 0x2c // ETHTOOL_SGRO
)

// SetOffload switches an offload of a device of the calling thread's network namespace.
func SetOffload(device string, offload Offload, on bool) error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("set an offload of %s: make a socket: %w", device, err)
	}
	defer unix.Close(fd)
	value := make([]byte, 8) // struct ethtool_value
	host.PutUint32(value, uint32(offload))
	if on {
		host.PutUint32(value[4:], 1)
	}
	if err := askDevice(fd, device, value); err != nil {
		return fmt.Errorf("set an offload of %s: %w", device, err)
	}
	return nil
}
