package bench

import (
	"encoding/binary"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"

	"github.com/millrace/millrace/kernel/netns"
)

// upstreamAddress is where the servers of DNS forward to, on their node.
var upstreamAddress = netip.MustParseAddrPort("127.0.0.1:5300")

// Message format: RFC 1035, 4.
const (
	headerSize = 12
	typeA      = 1
	typeSOA    = 6
	typeAAAA   = 28
	classIN    = 1
	// upstreamTTL is how long answers may be kept: longer than a run.
	upstreamTTL = 3600
	nxdomain    = 3
)

// upstream answers for the whole tree of names: what the servers of DNS have not in their
// caches yet. asked counts; while something is measured it stands still.
type upstream struct {
	conn  *net.UDPConn
	names map[string][]netip.Addr
	asked atomic.Int64
	ended chan struct{}
}

func (t *dnsTown) startUpstream() (*upstream, error) {
	u := &upstream{names: map[string][]netip.Addr{}, ended: make(chan struct{})}
	for name, address := range t.services {
		u.names[name] = []netip.Addr{address}
	}
	for name, address := range t.outside {
		u.names[name] = []netip.Addr{address}
	}
	err := netns.Do(t.node, func() (err error) {
		u.conn, err = net.ListenUDP("udp", net.UDPAddrFromAddrPort(upstreamAddress))
		return err
	})
	if err != nil {
		return nil, err
	}
	go u.serve()
	return u, nil
}

func (u *upstream) serve() {
	defer close(u.ended)
	query := make([]byte, 1500)
	for {
		n, from, err := u.conn.ReadFromUDPAddrPort(query)
		if err != nil {
			return
		}
		u.asked.Add(1)
		if answer := u.answer(query[:n]); answer != nil {
			_, _ = u.conn.WriteToUDPAddrPort(answer, from)
		}
	}
}

func (u *upstream) close() {
	u.conn.Close()
	<-u.ended
}

// answer answers a question; nil for what is none.
func (u *upstream) answer(query []byte) []byte {
	name, end := questionName(query)
	if end == 0 || end+4 > len(query) {
		return nil
	}
	kind := binary.BigEndian.Uint16(query[end:])
	answer := append([]byte{}, query[:end+4]...)
	copy(answer[2:], []byte{0x85, 0x80, 0, 1, 0, 0, 0, 0, 0, 0}) // QR, AA, RD, RA
	addresses, known := u.names[strings.ToLower(name)]
	found := byte(0)
	for _, address := range addresses {
		if (kind == typeA) == address.Is4() && (kind == typeA || kind == typeAAAA) {
			answer = appendRecord(answer, headerSize, kind, address.AsSlice())
			found++
		}
	}
	if answer[7] = found; found > 0 {
		return answer
	}
	if !known {
		answer[3] |= nxdomain
	}
	answer[9] = 1 // the zone's SOA: of the last two labels
	soa := append([]byte{1, 'n', 0, 1, 'h', 0}, make([]byte, 20)...)
	binary.BigEndian.PutUint32(soa[len(soa)-4:], upstreamTTL)
	return appendRecord(answer, headerSize+parentOffset(name), typeSOA, soa)
}

// parentOffset is where the last two labels of a name begin on the wire, or the name
// itself if it has no more.
func parentOffset(name string) int {
	labels := strings.Split(name, ".")
	return len(strings.Join(labels[:max(len(labels)-2, 0)], ".")) + min(1, max(len(labels)-2, 0))
}

// questionName reads the name of a message's question and where it ends; 0 for none.
func questionName(message []byte) (string, int) {
	var labels []string
	at := headerSize
	for at < len(message) && message[at] > 0 {
		next := at + 1 + int(message[at])
		if message[at] > 63 || next >= len(message) {
			return "", 0
		}
		labels = append(labels, string(message[at+1:next]))
		at = next
	}
	return strings.Join(labels, "."), at + 1
}

// appendRecord appends a record whose owner is at an offset.
func appendRecord(message []byte, owner int, kind uint16, data []byte) []byte {
	message = binary.BigEndian.AppendUint16(message, 0xc000|uint16(owner))
	message = binary.BigEndian.AppendUint16(message, kind)
	message = binary.BigEndian.AppendUint16(message, classIN)
	message = binary.BigEndian.AppendUint32(message, upstreamTTL)
	message = binary.BigEndian.AppendUint16(message, uint16(len(data)))
	return append(message, data...)
}

// appendQuestion appends a query with recursion desired.
func appendQuestion(message []byte, id uint16, name string, kind uint16) []byte {
	message = binary.BigEndian.AppendUint16(message, id)
	message = append(message, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	for label := range strings.SplitSeq(strings.TrimSuffix(name, "."), ".") {
		message = append(append(message, byte(len(label))), label...)
	}
	message = append(message, 0)
	message = binary.BigEndian.AppendUint16(message, kind)
	return binary.BigEndian.AppendUint16(message, classIN)
}
