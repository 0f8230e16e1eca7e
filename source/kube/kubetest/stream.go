package kubetest

import (
	"bytes"
	"net/http"
	"strconv"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer/streaming"
	"k8s.io/apimachinery/pkg/watch"
)

// stream writes watch events to a client.
type stream struct {
	w      http.ResponseWriter
	object runtime.Encoder
	events func(out *bytes.Buffer) streaming.Encoder
	kind   string
}

func (s *Server) stream(w http.ResponseWriter, q *asked) *stream {
	info := q.format.StreamSerializer
	w.Header().Set("Content-Type", q.format.MediaType)
	if q.format.MediaType != runtime.ContentTypeJSON {
		w.Header().Set("Content-Type", q.format.MediaType+";stream=watch")
	}
	w.WriteHeader(http.StatusOK)
	w.(http.Flusher).Flush()
	codec := s.codecs.EncoderForVersion(info.Serializer, corev1.SchemeGroupVersion)
	return &stream{w: w, object: s.encoder(q), kind: q.resource, events: func(out *bytes.Buffer) streaming.Encoder {
		return streaming.NewEncoder(info.Framer.NewFrameWriter(out), codec)
	}}
}

// frame is one event as bytes.
func (s *stream) frame(kind watch.EventType, obj runtime.Object) []byte {
	var inner, outer bytes.Buffer
	// a copy: encoding writes the kind into what several watches send
	if err := s.object.Encode(obj.DeepCopyObject(), &inner); err != nil {
		panic(err)
	}
	event := &metav1.WatchEvent{Type: string(kind), Object: runtime.RawExtension{Raw: inner.Bytes()}}
	if err := s.events(&outer).Encode(event); err != nil {
		panic(err)
	}
	return outer.Bytes()
}

func (s *stream) send(kind watch.EventType, obj runtime.Object) {
	s.w.Write(s.frame(kind, obj)) // who does not listen any more is noticed by the watch
	s.w.(http.Flusher).Flush()
}

// half sends the first half of an event and breaks the connection.
func (s *stream) half() {
	frame := s.frame(watch.Added, s.empty())
	s.w.Write(frame[:len(frame)/2])
	s.w.(http.Flusher).Flush()
	panic(http.ErrAbortHandler)
}

// change sends what a change is to a client with selectors.
func (s *stream) change(q *asked, c change) {
	then, now := q.selects(c.then), c.kind != watch.Deleted && q.selects(c.now)
	switch {
	case now && then:
		s.send(watch.Modified, c.now)
	case now:
		s.send(watch.Added, c.now)
	case then:
		s.send(watch.Deleted, c.now)
	}
}

func (s *stream) bookmark(version uint64) {
	o := s.empty()
	o.SetResourceVersion(strconv.FormatUint(version, 10))
	s.send(watch.Bookmark, o)
}

func (s *stream) empty() Object {
	switch s.kind {
	case "services":
		return &corev1.Service{}
	case "nodes":
		return &corev1.Node{}
	case "pods":
		return &corev1.Pod{}
	}
	return &discoveryv1.EndpointSlice{}
}
