package dns

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"strings"
)

// Codes of answers, as they are written (RFC 6895, 2.3).
const (
	codeOK     = "NOERROR"
	codeAbsent = "NXDOMAIN"
)

var codes = map[byte]string{0: codeOK, 1: "FORMERR", 2: "SERVFAIL", 3: codeAbsent, 4: "NOTIMP", 5: "REFUSED"}

// Numbers of messages (RFC 1035, 4).
const (
	typeA    = 1
	typeAAAA = 28
	classIN  = 1
)

var errMessage = errors.New("the answer is no message")

// questionOf is a query as resolvers send it, with recursion desired; nil for a name that none
// can have.
func questionOf(id uint16, name, kind string) []byte {
	labels := wire(name)
	if labels == nil || len(labels) > 254 {
		return nil
	}
	number := uint16(typeA)
	if kind == "AAAA" {
		number = typeAAAA
	}
	message := binary.BigEndian.AppendUint16(nil, id)
	message = append(message, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0)
	message = append(append(message, labels...), 0)
	message = binary.BigEndian.AppendUint16(message, number)
	return binary.BigEndian.AppendUint16(message, classIN)
}

// answerIn reads a message: the code, and the addresses and the alias of the type that was
// asked for.
func answerIn(message []byte) (*Answer, error) {
	if len(message) < headerLength || message[2]&0x80 == 0 {
		return nil, errMessage
	}
	code := message[3] & 0x0f
	answer := &Answer{Code: codes[code], Addresses: []netip.Addr{}}
	if answer.Code == "" {
		answer.Code = fmt.Sprint("code ", code)
	}
	asked, at, err := readName(message, headerLength)
	if err != nil || at+4 > len(message) {
		return nil, errMessage
	}
	kind := binary.BigEndian.Uint16(message[at:])
	at += 4
	for range binary.BigEndian.Uint16(message[6:]) {
		owner, next, err := readName(message, at)
		if err != nil || next+10 > len(message) {
			return nil, errMessage
		}
		at = next + 10 + int(binary.BigEndian.Uint16(message[next+8:]))
		if at > len(message) {
			return nil, errMessage
		}
		if binary.BigEndian.Uint16(message[next:]) != kind {
			continue
		}
		addr, ok := netip.AddrFromSlice(message[next+10 : at])
		if !ok {
			return nil, errMessage
		}
		answer.Addresses = append(answer.Addresses, addr)
		if !strings.EqualFold(owner, asked) {
			answer.Alias = owner
		}
	}
	return answer, nil
}

// readName reads a name that may be compressed, and says where it ends.
func readName(message []byte, at int) (name string, end int, err error) {
	var labels []string
	for hops := 0; at < len(message) && hops < 64; hops++ {
		switch length := int(message[at]); {
		case length == 0:
			if end == 0 {
				end = at + 1
			}
			return strings.Join(labels, "."), end, nil
		case length >= 0xc0:
			if at+1 >= len(message) {
				return "", 0, errMessage
			}
			if end == 0 {
				end = at + 2
			}
			at = int(binary.BigEndian.Uint16(message[at:]) & 0x3fff)
		case length > labelLimit || at+1+length > len(message):
			return "", 0, errMessage
		default:
			labels = append(labels, string(message[at+1:at+1+length]))
			at += 1 + length
		}
	}
	return "", 0, errMessage
}
