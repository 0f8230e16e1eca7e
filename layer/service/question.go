package service

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/millrace/millrace/model"
)

// anyPort is the source port of packets where the question has none.
const anyPort = 40000

// Question reads what a person asks: a protocol, who sends, and where to. A
// source is an address, with or without a port, or the name of a pod with an
// address of its own, "shop/client-1"; a destination is an address and a port,
// or the name of a Service and the number or name of its port, "shop/web:80". A
// name without a namespace is in "default". IPv6 addresses with a port are in
// brackets.
func (x *Explainer) Question(protocol, source, destination string) (Question, error) {
	p, err := model.ParseProtocol(protocol)
	if err != nil {
		return Question{}, err
	}
	if protocol == "" {
		return Question{}, errors.New("the protocol is missing: use tcp or udp")
	}
	sources, err := x.sources(source)
	if err != nil {
		return Question{}, fmt.Errorf("source %q: %w", source, err)
	}
	destinations, err := x.destinations(p, destination)
	if err != nil {
		return Question{}, fmt.Errorf("destination %q: %w", destination, err)
	}
	for _, to := range destinations {
		for _, from := range sources {
			if from.Addr().Is4() == to.Addr().Is4() {
				return Question{p, from, to}, nil
			}
		}
	}
	return Question{}, fmt.Errorf("source %q and destination %q: one is IPv4, the other IPv6: name two of one family", source, destination)
}

func (x *Explainer) sources(text string) ([]netip.AddrPort, error) {
	if address, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil {
		return []netip.AddrPort{netip.AddrPortFrom(address.Unmap().WithZone(""), 0)}, nil
	}
	if at, err := netip.ParseAddrPort(text); err == nil {
		return []netip.AddrPort{unmapped(at)}, nil
	}
	name, port, number := text, "", uint64(0)
	if i := strings.LastIndexByte(text, ':'); i >= 0 {
		name, port = text[:i], text[i+1:]
		var err error
		if number, err = strconv.ParseUint(port, 10, 16); err != nil {
			return nil, fmt.Errorf("%q is not a port: write ADDRESS, ADDRESS:PORT or NAMESPACE/POD, and IPv6 with a port in brackets", port)
		}
	}
	for _, pod := range x.known.Snapshot.Pods {
		if pod.Name == namedBy(name) && len(pod.Addresses) > 0 {
			return withPort(pod.Addresses, uint16(number)), nil
		}
	}
	return nil, errors.New("neither an address nor a pod that is known and has one: " + x.whoKnows())
}

func (x *Explainer) destinations(protocol model.Protocol, text string) ([]netip.AddrPort, error) {
	if at, err := netip.ParseAddrPort(text); err == nil {
		return []netip.AddrPort{unmapped(at)}, nil
	}
	i := strings.LastIndexByte(text, ':')
	if _, err := netip.ParseAddr(strings.Trim(text, "[]")); err == nil || i < 0 {
		return nil, errors.New("the port is missing: write ADDRESS:PORT, or [ADDRESS]:PORT for IPv6")
	}
	name, port := namedBy(text[:i]), text[i+1:]
	var found []netip.AddrPort
	known := false
	for frontend, row := range x.names {
		known = known || row.Service == name
		if row.Service == name && frontend.Protocol == protocol && (row.Port == port || fmt.Sprint(frontend.Address.Port()) == port) {
			found = append(found, frontend.Address)
		}
	}
	switch {
	case known && len(found) == 0:
		return nil, fmt.Errorf("no port %s/%s of Service %s has an address: see `millrace show services`", port, protocol, name)
	case len(found) == 0:
		return nil, errors.New("neither an address nor a Service that is known: " + x.whoKnows())
	}
	slices.SortFunc(found, netip.AddrPort.Compare) // IPv4 first
	return found, nil
}

// whoKnows says where names come from.
func (x *Explainer) whoKnows() string {
	if x.live() {
		return "names come from the agent, or from --source dir:PATH"
	}
	return "names are those of --source"
}

// namedBy reads "namespace/name"; the namespace is "default" where none is given.
func namedBy(text string) model.Name {
	if namespace, name, ok := strings.Cut(text, "/"); ok {
		return model.Name{Namespace: namespace, Name: name}
	}
	return model.Name{Namespace: "default", Name: text}
}

func withPort(addresses []netip.Addr, port uint16) []netip.AddrPort {
	var all []netip.AddrPort
	for _, address := range addresses {
		all = append(all, netip.AddrPortFrom(address.Unmap(), port))
	}
	return all
}

// sctp's common header, RFC 9260, 3.1; the others are tcp.h's and udp.h's.
const (
	ethernetLength = 14
	tcpLength      = 20
	udpLength      = 8
	sctpLength     = 12
)

// frameOf builds the question's packet: Ethernet, IP, and a TCP SYN, an empty
// UDP datagram or the header of SCTP, with their checksums.
func frameOf(q Question) ([]byte, error) {
	source, destination := q.Source.Addr(), q.Destination.Addr()
	if source.Is4() != destination.Is4() {
		return nil, errors.New("one address is IPv4, the other IPv6")
	}
	segment, checksumAt := segmentOf(q)
	sum := sumOf(source.AsSlice()) + sumOf(destination.AsSlice()) + uint32(q.Protocol) + uint32(len(segment)) + sumOf(segment)
	if checksumAt > 0 {
		binary.BigEndian.PutUint16(segment[checksumAt:], ^folded(sum))
	}
	frame := make([]byte, 0, ethernetLength+40+len(segment))
	frame = append(frame, 2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2) // locally administered
	if source.Is4() {
		frame = append(frame, 0x08, 0x00, 0x45, 0, 0, byte(20+len(segment)), 0, 0, 0x40, 0, 64, byte(q.Protocol), 0, 0)
		frame = append(append(frame, source.AsSlice()...), destination.AsSlice()...)
		header := frame[ethernetLength:]
		binary.BigEndian.PutUint16(header[10:], ^folded(sumOf(header)))
	} else {
		frame = append(frame, 0x86, 0xdd, 0x60, 0, 0, 0, 0, byte(len(segment)), byte(q.Protocol), 64)
		frame = append(append(frame, source.AsSlice()...), destination.AsSlice()...)
	}
	return append(frame, segment...), nil
}

// segmentOf is the transport header, and where its checksum of ones' complement
// belongs; 0 if it has none.
func segmentOf(q Question) (segment []byte, checksumAt int) {
	switch q.Protocol {
	case model.TCP:
		segment, checksumAt = make([]byte, tcpLength), 16
		segment[12], segment[13] = tcpLength/4<<4, 0x02 // SYN
		segment[14], segment[15] = 0xff, 0xff           // the window
	case model.UDP:
		segment, checksumAt = make([]byte, udpLength), 6
		segment[5] = udpLength
	default:
		segment = make([]byte, sctpLength)
	}
	port := q.Source.Port()
	if port == 0 {
		port = anyPort
	}
	binary.BigEndian.PutUint16(segment, port)
	binary.BigEndian.PutUint16(segment[2:], q.Destination.Port())
	return segment, checksumAt
}

// sumOf adds up 16-bit words (RFC 1071) of fewer than 65,536 bytes.
func sumOf(bytes []byte) (sum uint32) {
	for ; len(bytes) > 1; bytes = bytes[2:] {
		sum += uint32(bytes[0])<<8 | uint32(bytes[1])
	}
	if len(bytes) == 1 {
		sum += uint32(bytes[0]) << 8
	}
	return sum
}

func folded(sum uint32) uint16 {
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	return uint16(sum)
}
