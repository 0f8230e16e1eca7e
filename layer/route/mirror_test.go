package route

import (
	"bytes"
	"encoding/binary"
	"net/netip"
	"slices"
)

// mirror decides in Go what the programs decide in C.
type mirror struct {
	remotes map[netip.Prefix]datapathRemote
	vteps   map[netip.Addr]datapathVtep
	port    uint16
	vni     uint32
	// pods are behind the node, with the MACs of their veths' two ends; uplink is where
	// packets come from.
	pods   map[netip.Addr][2][6]byte
	uplink int
	// relabel says that packets may be of another family than what is outside.
	relabel bool
}

const none = datapathOutcomeOUTCOME_COUNT

// head is an IP header.
type head struct {
	ip4                 bool
	source, destination netip.Addr
	tos, hops           byte
}

func readHead(frame []byte, at int, kind uint16) (h head, ok bool) {
	switch {
	case kind == 0x0800 && len(frame) >= at+20 && frame[at]>>4 == 4:
		return head{true, netip.AddrFrom4([4]byte(frame[at+12:])), netip.AddrFrom4([4]byte(frame[at+16:])), frame[at+1], frame[at+8]}, true
	case kind == 0x86dd && len(frame) >= at+40 && frame[at]>>4 == 6:
		return head{false, netip.AddrFrom16([16]byte(frame[at+8:])).Unmap(), netip.AddrFrom16([16]byte(frame[at+24:])).Unmap(), frame[at]<<4 | frame[at+1]>>4, frame[at+7]}, true
	}
	return h, false
}

// hop takes one hop off the packet at an offset.
func (h head) hop(frame []byte, at int) {
	if !h.ip4 {
		frame[at+7]--
		return
	}
	frame[at+8]--
	sum := uint32(binary.LittleEndian.Uint16(frame[at+10:])) + 1
	if sum >= 0xffff {
		sum++
	}
	binary.LittleEndian.PutUint16(frame[at+10:], uint16(sum))
}

func (h head) mark(frame []byte, at int, ecn byte) {
	tos := h.tos&^3 | ecn
	if !h.ip4 {
		frame[at+1] = frame[at+1]&0x0f | tos<<4
		return
	}
	sum := uint32(^binary.BigEndian.Uint16(frame[at+10:])) + uint32(^uint16(h.tos)) + uint32(tos)
	sum = sum&0xffff + sum>>16
	sum = sum&0xffff + sum>>16
	binary.BigEndian.PutUint16(frame[at+10:], ^uint16(sum))
	frame[at+1] = tos
}

func (m *mirror) remote(to netip.Addr) (best datapathRemote, found bool) {
	bits := -1
	for p, r := range m.remotes {
		if p.Contains(to) && p.Bits() > bits {
			best, found, bits = r, true, p.Bits()
		}
	}
	return best, found
}

// fromPod says what becomes of a frame of a pod, and what it is then. The source port and
// the number of the packet outside are as in got.
func (m *mirror) fromPod(frame, got []byte) (datapathOutcome, []byte) {
	h, ok := readHead(frame, 14, binary.BigEndian.Uint16(frame[12:]))
	to, found := m.remote(h.destination)
	_, own := m.pods[h.source]
	if ok && isUDPTo(frame, m.port) && (m.isVTEP(h.source) || m.isVTEP(h.destination)) {
		return datapathOutcomeOUTCOME_STRANGER, frame
	}
	switch {
	case !ok || !found:
		return none, frame
	case !own || to.Direct != 0 && hasOptions(frame):
		return datapathOutcomeOUTCOME_STACK, frame
	case h.hops <= 1:
		return datapathOutcomeOUTCOME_EXPIRED, frame
	case len(frame)-14 > int(to.Mtu):
		return datapathOutcomeOUTCOME_TOO_BIG, frame
	}
	if to.Direct != 0 {
		frame = bytes.Clone(frame)
		h.hop(frame, 14)
		return datapathOutcomeOUTCOME_SENT_DIRECT, frame
	}
	inner := bytes.Clone(frame[14:])
	h.hop(inner, 0)
	return datapathOutcomeOUTCOME_SENT, m.wrapped(frame[:12], inner, h, to, got)
}

func (m *mirror) isVTEP(a netip.Addr) bool {
	_, is := m.vteps[a]
	return is
}

// isUDPTo says whether a frame is UDP to a port, also behind options and extension headers
// (RFC 8200, 4.1), and the first part of it; or whether there are too many of those.
func isUDPTo(frame []byte, port uint16) bool {
	at, next := 54, frame[20]
	if frame[12] == 8 {
		if binary.BigEndian.Uint16(frame[20:])&0x1fff != 0 {
			return false
		}
		at, next = 14+int(frame[14]&15)*4, frame[23]
	}
	for headers := 0; frame[12] != 8 && slices.Contains([]byte{0, 43, 44, 51, 60}, next); headers++ {
		if headers == 8 || at > 1024 || at+8 > len(frame) {
			return true
		}
		switch {
		case next == 44 && binary.BigEndian.Uint16(frame[at+2:])&0xfff8 != 0:
			return false
		case next == 44:
			next, at = frame[at], at+8
		case next == 51:
			next, at = frame[at], at+(int(frame[at+1])+2)*4
		default:
			next, at = frame[at], at+(int(frame[at+1])+1)*8
		}
	}
	if frame[12] != 8 && at > 1024 {
		return true
	}
	return next == 17 && at+4 <= len(frame) && binary.BigEndian.Uint16(frame[at+2:]) == port
}

// hasOptions says whether a frame's IP header has something that routers have to read.
func hasOptions(frame []byte) bool {
	if frame[12] == 8 {
		return frame[14]&15 != 5
	}
	return frame[20] == 0
}

// forward says what becomes of a frame from other machines that is not of VXLAN.
func (m *mirror) forward(frame []byte) (datapathOutcome, []byte) {
	h, ok := readHead(frame, 14, binary.BigEndian.Uint16(frame[12:]))
	from, found := m.remote(h.source)
	macs, local := m.pods[h.destination]
	if !ok || !found || from.Direct == 0 || int(from.Uplink) != m.uplink || !local || hasOptions(frame) || h.hops <= 1 || len(frame)-14 > 1500 {
		return none, frame
	}
	frame = append(append(bytes.Clone(macs[1][:]), macs[0][:]...), frame[12:]...)
	h.hop(frame, 14)
	return datapathOutcomeOUTCOME_TAKEN_DIRECT, frame
}

// wrapped is a packet inside one of VXLAN.
func (m *mirror) wrapped(macs, inner []byte, h head, to datapathRemote, got []byte) []byte {
	kind := uint16(0x86dd)
	if h.ip4 {
		kind = 0x0800
	}
	frame := binary.BigEndian.AppendUint32(nil, 8<<24)
	frame = binary.BigEndian.AppendUint32(frame, m.vni<<8)
	frame = append(append(frame, to.Mac[:]...), to.OwnMac[:]...)
	frame = append(binary.BigEndian.AppendUint16(frame, kind), inner...)
	length := len(frame) + 8
	local, vtep := fromAddress(to.Local), fromAddress(to.Vtep)
	outer := bytes.Clone(macs)
	at := 34
	if to.Ip4 != 0 {
		outer = append(outer, 8, 0, 0x45, h.tos)
		outer = binary.BigEndian.AppendUint16(outer, uint16(length+20))
		outer = append(outer, got[18], got[19], 0, 0, 64, 17, 0, 0)
		outer = append(append(outer, local.AsSlice()...), vtep.AsSlice()...)
		binary.BigEndian.PutUint16(outer[24:], checksum(outer[14:]))
	} else {
		at = 54
		outer = append(outer, 0x86, 0xdd, 0x60|h.tos>>4, h.tos<<4, 0, 0)
		outer = binary.BigEndian.AppendUint16(outer, uint16(length))
		outer = append(outer, 17, 64)
		outer = append(append(outer, local.AsSlice()...), vtep.AsSlice()...)
	}
	outer = append(outer, got[at], got[at+1])
	outer = binary.BigEndian.AppendUint16(outer, m.port)
	outer = binary.BigEndian.AppendUint16(outer, uint16(length))
	return append(append(outer, 0, 0), frame...)
}

// checksum is that of RFC 1071.
func checksum(data []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(data); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(data[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return ^uint16(sum)
}

// fromWire says what becomes of a frame from other machines, and what it is then.
func (m *mirror) fromWire(frame []byte) (datapathOutcome, []byte) {
	kind := binary.BigEndian.Uint16(frame[12:])
	outer, ok := readHead(frame, 14, kind)
	if !ok {
		return m.forward(frame)
	}
	udp := 54
	if outer.ip4 {
		udp = 34
	}
	if len(frame) < udp+8 || outer.ip4 && (frame[14] != 0x45 || frame[23] != 17 || binary.BigEndian.Uint16(frame[20:])&0x3fff != 0) || !outer.ip4 && frame[20] != 17 {
		return m.forward(frame)
	}
	at := udp + 8 + 8 + 14
	if binary.BigEndian.Uint16(frame[udp+2:]) != m.port || len(frame) < at+20 || frame[udp+8] != 8 || binary.BigEndian.Uint32(frame[udp+12:]) != m.vni<<8 {
		return m.forward(frame)
	}
	here, there := m.vteps[outer.destination], m.vteps[outer.source]
	if _, known := m.vteps[outer.source]; here.Device == 0 || !bytes.Equal(frame[udp+16:udp+22], here.Mac[:]) {
		return m.forward(frame)
	} else if !known || there.Device != 0 {
		return datapathOutcomeOUTCOME_STRANGER, frame
	}
	inner := binary.BigEndian.Uint16(frame[at-2:])
	h, ok := readHead(frame, at, inner)
	if !ok {
		return none, frame
	}
	frame = bytes.Clone(frame)
	// RFC 6040, figure 4: rows are inside, columns outside, in the order of their bits.
	const drop = 9
	ecn := [4][4]byte{{0, 0, 0, drop}, {1, 1, 1, 3}, {2, 1, 2, 3}, {3, 3, 3, 3}}[h.tos&3][outer.tos&3]
	if ecn == drop {
		return datapathOutcomeOUTCOME_CONGESTED, frame
	}
	if ecn != h.tos&3 {
		h.mark(frame, at, ecn)
	}
	if !m.relabel && !outer.ip4 && len(frame)-at < 40 {
		return datapathOutcomeOUTCOME_UNWRITABLE, frame // shorter than a header of the family outside
	}
	macs, local := m.pods[h.destination]
	local = local && (h.ip4 || !h.source.IsMulticast()) // the kernel knows no way for those
	if h.hops <= 1 || !m.relabel && h.ip4 != outer.ip4 || !local || len(frame)-at > 1500 {
		taken := append(bytes.Clone(here.Mac[:]), frame[udp+16:udp+22]...)
		return datapathOutcomeOUTCOME_TAKEN_STACK, append(taken, frame[at-2:]...)
	}
	h.hop(frame, at)
	taken := append(bytes.Clone(macs[1][:]), macs[0][:]...)
	return datapathOutcomeOUTCOME_TAKEN, append(taken, frame[at-2:]...)
}
