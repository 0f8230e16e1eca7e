package nodedns

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/millrace/millrace/kernel/netns"
)

// What the agent cannot answer it puts to the DNS Service, as it came but for its id. It
// comes from the node either way, so that nothing of it is lost but the client's port.

const (
	// askedTimes is how often the DNS Service is asked in all, each time by a socket of its
	// own, which may come to another of its endpoints; askedFor is how long each is waited
	// for.
	askedTimes = 3
	askedFor   = 1500 * time.Millisecond
	// refusedFor is how long to wait after a refusal: an endpoint has just gone.
	refusedFor = 100 * time.Millisecond
	// missesMost is how many messages may come that do not answer what was asked: somebody
	// may be guessing (RFC 5452, 9.2).
	missesMost = 3
	// header is the length of a message's, and question that of what is behind a name.
	header, questionTail = 12, 4
	mostName             = 255
)

// relay asks the DNS Service what a client has asked; nil where it does not answer before
// the context ends.
func (s *server) relay(ctx context.Context, family datapathFamily, query, question []byte) []byte {
	asked := append([]byte(nil), query...)
	for range askedTimes {
		var id [2]byte
		_, _ = rand.Read(id[:])
		copy(asked, id[:])
		begun := time.Now()
		reply, err := s.ask(ctx, family, asked, question)
		if err == nil {
			copy(reply, query[:2])
			return reply
		}
		if wait := refusedFor - time.Since(begun); wait > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
		}
		if ctx.Err() != nil {
			break
		}
	}
	return nil
}

// ask puts a query to the DNS Service once, from a port by chance. The kernel lets nobody
// answer but whom the socket is connected to.
func (s *server) ask(ctx context.Context, family datapathFamily, query, question []byte) ([]byte, error) {
	ctx, done := context.WithTimeout(ctx, cmp.Or(s.layer.settings.asked, askedFor))
	defer done()
	c, err := s.dial(ctx, family)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	defer context.AfterFunc(ctx, func() { _ = c.SetDeadline(time.Unix(1, 0)) })()
	if _, err := c.Write(query); err != nil {
		return nil, err
	}
	buffer := make([]byte, 1<<16)
	for range missesMost {
		n, err := c.Read(buffer)
		if err != nil {
			return nil, err
		}
		if replies(buffer[:n], query, question) {
			return buffer[:n], nil
		}
	}
	return nil, errGuessed
}

// errGuessed says that what came answers something else.
var errGuessed = errors.New("it answers other questions, which may be somebody's guesses")

var errNobody = errors.New("there is no DNS Service any more")

// dial connects a socket of the agent's own to the DNS Service.
func (s *server) dial(ctx context.Context, family datapathFamily) (c net.Conn, err error) {
	l := s.layer
	l.mu.Lock()
	by, _, err := l.tables.detours.Get(family)
	l.mu.Unlock()
	if err == nil && by.Service == (datapathAddress{}) {
		err = errNobody
	}
	if err != nil {
		return nil, err
	}
	dialer := net.Dialer{Control: l.Own}
	to := netip.AddrPortFrom(fromAddress(by.Service), dnsPort)
	err = netns.In(l.settings.Netns, func() (err error) {
		c, err = dialer.DialContext(ctx, "udp", to.String())
		return err
	})
	return c, err
}

// questionOf is the question of a message, in lower case; nil where there is none, or are
// several.
func questionOf(message []byte) []byte {
	if len(message) < header || binary.BigEndian.Uint16(message[4:]) != 1 {
		return nil
	}
	at := header
	for at < len(message) && message[at] != 0 {
		if message[at] >= 64 {
			return nil
		}
		at += 1 + int(message[at])
	}
	end := at + 1 + questionTail
	if end > len(message) || at+1-header > mostName {
		return nil
	}
	question := bytes.Clone(message[header:end])
	for i, b := range question[:at-header] { // lengths are no letters
		if 'A' <= b && b <= 'Z' {
			question[i] = b + 'a' - 'A'
		}
	}
	return question
}

// isQuery says that a message is one: with a header, and no reply.
func isQuery(message []byte) bool { return len(message) >= header && message[2]&0x80 == 0 }

// formatError is what a query is answered that has no question, or several (RFC 1035, 4.1.1).
func formatError(query []byte) []byte {
	reply := make([]byte, header)
	copy(reply, query[:3])
	reply[2] |= 0x80 // QR
	reply[3] = 1
	return reply
}

// replies says whether a message is the answer to a query with this question. A server that
// refuses one may leave the question out.
func replies(message, query, question []byte) bool {
	const operation = 0x78
	if len(message) < header || !bytes.Equal(message[:2], query[:2]) || message[2]&0x80 == 0 || (message[2]^query[2])&operation != 0 {
		return false
	}
	if binary.BigEndian.Uint16(message[4:]) == 0 {
		return message[3]&0x0f != 0
	}
	return bytes.Equal(questionOf(message), question)
}
