package link

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/netns"
)

const (
	// neighbourFor is how long a neighbour has to answer: two requests of the kernel, a second
	// apart (retrans_time_ms of arp(7)).
	neighbourFor = 1500 * time.Millisecond
	// neighbourLook is how often it is looked whether it has.
	neighbourLook = 20 * time.Millisecond
)

// ErrNoNeighbour says that nobody answered for an address.
var ErrNoNeighbour = errors.New("no neighbour answers for it")

// Neighbour is the hardware address by which the kernel of a namespace reaches an address on a
// link. Where it does not know one, it is made to ask.
func Neighbour(ctx context.Context, space string, index int, addr netip.Addr) (mac net.HardwareAddr, err error) {
	err = netns.In(space, func() error {
		for end := time.Now().Add(neighbourFor); ; {
			if mac, err = neighbour(index, addr); mac != nil || err != nil {
				return err
			}
			if err := askFor(index, addr); err != nil {
				return err
			}
			if time.Now().After(end) {
				return ErrNoNeighbour
			}
			select {
			case <-ctx.Done():
				return context.Cause(ctx)
			case <-time.After(neighbourLook):
			}
		}
	})
	if err != nil {
		return nil, fmt.Errorf("find neighbour %s on link %d: %w", addr, index, err)
	}
	return mac, nil
}

// neighbour reads one entry: nil where there is none, or none that is of use (RTM_GETNEIGH of
// one address, Linux 5.0; a list would be of all).
func neighbour(index int, addr netip.Addr) (net.HardwareAddr, error) {
	request := nl.NewNetlinkRequest(unix.RTM_GETNEIGH, 0)
	request.AddData(&netlink.Ndmsg{Family: familyOf(addr), Index: uint32(index)})
	request.AddData(nl.NewRtAttr(unix.NDA_DST, addr.AsSlice()))
	answers, err := request.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWNEIGH)
	if errors.Is(err, unix.ENOENT) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	for _, answer := range answers {
		found, err := netlink.NeighDeserialize(answer)
		if err != nil {
			return nil, err
		}
		if found.State&(netlink.NUD_INCOMPLETE|netlink.NUD_FAILED) == 0 && len(found.HardwareAddr) > 0 {
			return found.HardwareAddr, nil
		}
	}
	return nil, nil
}

// askFor has the kernel ask for a neighbour, as if a packet were to go there.
func askFor(index int, addr netip.Addr) error {
	return netlink.NeighSet(&netlink.Neigh{LinkIndex: index, Family: int(familyOf(addr)), Flags: netlink.NTF_USE, IP: addr.AsSlice()})
}

func familyOf(addr netip.Addr) uint8 {
	if addr.Is4() {
		return unix.AF_INET
	}
	return unix.AF_INET6
}
