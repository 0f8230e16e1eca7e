package cause

import (
	"net/netip"
	"slices"
	"testing"
	"time"
)

// named are the causes of some evidence, each with its namespace.
func named(e *Evidence) (all []string) {
	for _, v := range Diagnose(e) {
		all = append(all, v.Cause+" "+v.Where.Namespace)
	}
	slices.Sort(all)
	return all
}

func addr(text string) Addr { return Addr{Index: 2, Prefix: netip.MustParsePrefix(text)} }

// pair is a sender with data left, and a receiver whose window is zero; the sender speaks
// with an address that somebody on the way may translate.
func pair(idle bool, to string) *Evidence {
	from, at := netip.MustParseAddrPort("10.1.0.2:40000"), netip.MustParseAddrPort("10.2.0.2:8080")
	sender := Socket{Protocol: 6, State: tcpEstablished, Local: from, Remote: netip.MustParseAddrPort(to), SendQueue: 90000, Probing: true, Backoff: 3, MSS: 1448, Idle: idle}
	receiver := Socket{Protocol: 6, State: tcpEstablished, Local: at, Remote: from, ReceiveQueue: 16000, MSS: 1448, LastReceived: 2 * time.Second, Idle: idle}
	return &Evidence{Spaces: []*Space{
		{Inode: 1, Name: "client", Addrs: []Addr{addr("10.1.0.2/24")}, After: Reading{Sockets: []Socket{sender}}},
		{Inode: 2, Name: "server", Addrs: []Addr{addr("10.2.0.2/24")}, After: Reading{Sockets: []Socket{receiver}}},
	}}
}

// A receiver is stalled if nothing moves between two looks, wherever its sender believes
// it to be; one that is slow is not.
func TestStalled(t *testing.T) {
	older := func(window int) *Evidence { // a kernel that does not say the receiver's window
		e := pair(true, "10.2.0.2:8080")
		e.Spaces[0].After.Sockets[0].SendWindow, e.Spaces[0].After.Sockets[0].Probing = window, window == 0
		e.Spaces[1].After.Sockets[0].ReceiveWindow = -1
		return e
	}
	full := older(60000) // the buffer became smaller than what had been offered
	full.Spaces[1].After.Sockets[0].ReceiveBuffer, full.Spaces[1].After.Sockets[0].Drops = 16384, 27
	ended := pair(true, "10.2.0.2:8080")
	ended.Spaces[1].After.Sockets[0].State, ended.Spaces[1].After.Sockets[0].ReceiveQueue = tcpCloseWait, 1
	for _, row := range []struct {
		name string
		e    *Evidence
		want []string
	}{
		{"on an older kernel", older(0), []string{"receiver-stalled server"}},
		{"on an older kernel, whose sender may send", older(60000), nil},
		{"on an older kernel, which throws away what comes", full, []string{"receiver-stalled server"}},
		{"nothing is unread but the end", ended, nil},
		{"nothing moves", pair(true, "10.2.0.2:8080"), []string{"receiver-stalled server"}},
		{"behind a translated address", pair(true, "10.96.0.1:80"), []string{"receiver-stalled server"}},
		{"a slow reader", pair(false, "10.2.0.2:8080"), nil},
	} {
		if got := named(row.e); !slices.Equal(got, row.want) {
			t.Errorf("%s: %v, not %v", row.name, got, row.want)
		}
	}
	outside := pair(true, "203.0.113.9:80")
	outside.Spaces = outside.Spaces[:1]
	if got := named(outside); !slices.Equal(got, []string{"receiver-stalled client"}) {
		t.Errorf("a receiver that was not looked at: %v", got)
	}
}

// What is asked for through a tunnel dies with the tunnel's packets, and a frame for a
// port that does not forward dies of that; neither is a cause beside it.
func TestWhatFollowsIsNotNamed(t *testing.T) {
	outer := Tuple{Protocol: 17, Source: netip.MustParseAddrPort("10.1.0.2:35000"), Destination: netip.MustParseAddrPort("10.2.0.2:4789")}
	inner := Tuple{Protocol: 6, Source: netip.MustParseAddrPort("100.64.0.1:41000"), Destination: netip.MustParseAddrPort("100.64.0.2:80"), TCPFlags: 2}
	tunnel := func(id int) []Link {
		return []Link{{Index: 2, Name: "eth0", Kind: "veth", Up: true, Carrier: true, MTU: 1500},
			{Index: 5, Name: "vx", Kind: "vxlan", Up: true, Carrier: true, MTU: 1400, VXLAN: &VXLAN{ID: id, Port: 4789}}}
	}
	e := &Evidence{
		Spaces: []*Space{
			{Inode: 1, Name: "client", Addrs: []Addr{addr("10.1.0.2/24"), {Index: 5, Prefix: netip.MustParsePrefix("100.64.0.1/24")}}, After: Reading{Links: tunnel(7)}},
			{Inode: 2, Name: "server", Addrs: []Addr{addr("10.2.0.2/24"), {Index: 5, Prefix: netip.MustParsePrefix("100.64.0.2/24")}}, After: Reading{Links: tunnel(8)}},
		},
		Events: []Event{
			{Kind: Drop, Space: 2, Count: 3, Reason: "VXLAN_VNI_NOT_FOUND", Location: "vxlan_rcv", Device: "eth0", Index: 2, Tuple: outer},
			{Kind: Drop, Space: 1, Count: 4, Reason: "NEIGH_FAILED", Location: "neigh_invalidate", Device: "vx", Index: 5, Tuple: inner},
			{Kind: ICMPSent, Space: 1, Count: 4, Type: 3, Code: 1, Device: "vx", Index: 5, Tuple: inner},
		},
	}
	if got := named(e); !slices.Equal(got, []string{"vxlan-unknown-vni server"}) {
		t.Errorf("a neighbour behind a tunnel: %v", got)
	}
	port := func(index int, name, state string) Link {
		return Link{Index: index, Name: name, Kind: "veth", Up: true, Carrier: true, MTU: 1500, Master: 9, PortState: state}
	}
	e = &Evidence{
		Spaces: []*Space{{Inode: 3, Name: "switch", After: Reading{Links: []Link{
			port(2, "left", "forwarding"), port(3, "right", "blocking"), {Index: 9, Name: "br0", Kind: "bridge", Up: true, Carrier: true, MTU: 1500}}}}},
		Events: []Event{{Kind: Drop, Space: 3, Count: 4, Reason: "NO_TX_TARGET", Location: "br_handle_frame_finish", Device: "left", Index: 2, Tuple: inner}},
	}
	if got := named(e); !slices.Equal(got, []string{"bridge-port-blocked switch"}) {
		t.Errorf("a frame that may not leave: %v", got)
	}
	e.Spaces[0].After.Links[1].PortState = "forwarding"
	if got := named(e); slices.Contains(got, "bridge-port-blocked switch") {
		t.Errorf("all ports forward: %v", got)
	}
}
