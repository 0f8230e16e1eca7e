package model

import "net/netip"

// Flannel is what a Node says of how flannel's other nodes reach its pods, in annotations
// (https://github.com/flannel-io/flannel/blob/master/Documentation/kubernetes.md). Two are
// equal if they say the same.
type Flannel struct {
	// Backend is flannel's word for the way there: "vxlan", "host-gw" or another one.
	Backend string
	// VNI is the number of the network in VXLAN.
	VNI uint32
	// MAC and MAC6 are the hardware addresses of the node's vxlan devices over IPv4 and over
	// IPv6; zero where it has none.
	MAC, MAC6 [6]byte
	// Address and Address6 are where it takes packets; the zero value where it takes none.
	Address, Address6 netip.Addr
	// Millrace says that an agent of millrace wrote this, for flannel's nodes: flannel does
	// not run there. Port is the UDP port of its VXLAN then, else 0, for flannel says
	// that in FlannelNetwork alone.
	Millrace bool
	Port     uint16
}

// FlannelNetwork is how flannel is configured in a cluster: its net-conf.json.
type FlannelNetwork struct {
	// VNI and Port are those of VXLAN; 0 are flannel's own.
	VNI  uint32
	Port uint16
	// DirectRouting says that packets to nodes on the same segment go as they are, in spite
	// of VXLAN.
	DirectRouting bool
}
