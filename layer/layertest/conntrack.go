package layertest

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// FillConntrack fills the table of the calling thread's namespace with connections
// that nothing evicts: established, and seen in both directions. Something has to track
// connections there, or nothing meets the table.
func FillConntrack() error {
	text, err := os.ReadFile("/proc/sys/net/netfilter/nf_conntrack_max")
	if err != nil {
		return err
	}
	most, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return err
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	send := func(messages []byte) error {
		return unix.Sendto(fd, messages, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
	}
	const deleteAll = 1<<8 | 2 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_DELETE
	if err := send(ctMessage(deleteAll, nil)); err != nil {
		return err
	}
	one := establishedEntry()
	var many []byte
	for i := range most {
		client := []byte{203, byte(i >> 16), byte(i >> 8), byte(i)}
		many = append(many, bytes.ReplaceAll(one, placeholder, client)...)
		if len(many) > 100_000 || i == most-1 {
			if err := send(many); err != nil {
				return fmt.Errorf("after %d entries: %w", i, err)
			}
			many = many[:0]
		}
	}
	return nil
}

// placeholder stands for the client's address.
var placeholder = []byte{0xde, 0xad, 0xbe, 0xef}

// establishedEntry is the message that makes an entry (ctnetlink, linux/netfilter/
// nfnetlink_conntrack.h).
func establishedEntry() []byte {
	server := []byte{192, 0, 2, 1}
	tuple := func(kind int, source, target []byte, from, to uint16) *nl.RtAttr {
		t := nl.NewRtAttr(kind|unix.NLA_F_NESTED, nil)
		ip := t.AddRtAttr(1|unix.NLA_F_NESTED, nil) // CTA_TUPLE_IP
		ip.AddRtAttr(1, source)
		ip.AddRtAttr(2, target)
		proto := t.AddRtAttr(2|unix.NLA_F_NESTED, nil) // CTA_TUPLE_PROTO
		proto.AddRtAttr(1, []byte{unix.IPPROTO_TCP})
		proto.AddRtAttr(2, binary.BigEndian.AppendUint16(nil, from))
		proto.AddRtAttr(3, binary.BigEndian.AppendUint16(nil, to))
		return t
	}
	const seenBothAssuredConfirmed, seconds, established = 0xe, 3600, 3
	info := nl.NewRtAttr(4|unix.NLA_F_NESTED, nil) // CTA_PROTOINFO, _TCP, _TCP_STATE
	info.AddRtAttr(1|unix.NLA_F_NESTED, nil).AddRtAttr(1, []byte{established})
	var attributes []byte
	for _, a := range []*nl.RtAttr{
		tuple(1, placeholder, server, 1024, 80), // CTA_TUPLE_ORIG
		tuple(2, server, placeholder, 80, 1024), // CTA_TUPLE_REPLY
		nl.NewRtAttr(3, binary.BigEndian.AppendUint32(nil, seenBothAssuredConfirmed)),
		nl.NewRtAttr(7, binary.BigEndian.AppendUint32(nil, seconds)),
		info,
	} {
		attributes = append(attributes, a.Serialize()...)
	}
	const newEntry = 1 << 8 // NFNL_SUBSYS_CTNETLINK, IPCTNL_MSG_CT_NEW
	return ctMessage(newEntry, attributes)
}

func ctMessage(kind uint16, attributes []byte) []byte {
	m := binary.NativeEndian.AppendUint32(nil, uint32(unix.SizeofNlMsghdr+4+len(attributes)))
	m = binary.NativeEndian.AppendUint16(m, kind)
	m = binary.NativeEndian.AppendUint16(m, unix.NLM_F_REQUEST|unix.NLM_F_CREATE)
	m = append(m, make([]byte, 8)...)
	return append(append(m, unix.AF_INET, 0, 0, 0), attributes...)
}
