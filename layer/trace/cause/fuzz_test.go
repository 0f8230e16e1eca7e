package cause

import (
	"net/netip"
	"testing"
	"time"
)

// FuzzPackets lets any bytes be the packet of what died for every reason that rules look
// into packets for.
func FuzzPackets(f *testing.F) {
	f.Add([]byte{0x45, 0, 0, 20}, uint8(17), uint16(4789))
	f.Add(append([]byte{0x4f, 0, 0, 90, 0, 0, 0, 0, 1, 17}, make([]byte, 60)...), uint8(17), uint16(4789))
	f.Add(append([]byte{0x60, 0, 0, 0, 0, 8, 44, 64}, make([]byte, 48)...), uint8(6), uint16(80))
	reasons := []string{"NETFILTER_DROP", "VXLAN_VNI_NOT_FOUND", "IP_INHDR", "NO_SOCKET", "SOCKET_FILTER", "OTHERHOST", "", "IP_CSUM"}
	f.Fuzz(func(t *testing.T, packet []byte, protocol uint8, port uint16) {
		here, there := netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("10.0.0.2")
		s := &Space{Inode: 1, Name: "a", Addrs: []Addr{{Index: 2, Prefix: netip.PrefixFrom(here, 24)}}}
		s.After.Links = []Link{{Index: 2, Name: "eth0", Up: true, Carrier: true}, {Index: 3, Name: "vx0", Kind: "vxlan", VXLAN: &VXLAN{ID: 42, Port: 4789}}}
		e := &Evidence{Window: time.Second, Spaces: []*Space{s}}
		for i, reason := range reasons {
			event := Event{Kind: Drop, Space: 1, Count: uint64(i) + 1, Reason: reason, Location: "f", Index: 2, Device: "eth0", Packet: packet, Length: len(packet)}
			event.Tuple = Tuple{Protocol: protocol, Source: netip.AddrPortFrom(there, 4711), Destination: netip.AddrPortFrom(here, port)}
			e.Events = append(e.Events, event)
			event.Kind, event.Type, event.Code = ICMPSent, 11, 0
			e.Events = append(e.Events, event)
		}
		for _, v := range Diagnose(e) {
			complete(t, v.Cause, v)
		}
	})
}
