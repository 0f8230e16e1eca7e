package kubetest

import (
	"maps"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/watch"
)

// asked is one request, understood.
type asked struct {
	resource string
	labels   labels.Selector
	fields   fields.Selector
	query    func(string) string
	format   runtime.SerializerInfo
}

// ServeHTTP answers list and watch, and get of what is in a namespace.
func (s *Server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	group, resource, ok := strings.Cut(strings.TrimPrefix(strings.TrimPrefix(r.URL.Path, "/apis/"), "/api/v1"), "/")
	one := ""
	if parts := strings.Split(resource, "/"); len(parts) == 4 && parts[0] == "namespaces" {
		resource, one = parts[2], parts[1]+"/"+parts[3]
	} else if i := strings.LastIndexByte(resource, '/'); i >= 0 {
		resource = resource[i+1:]
	}
	query := r.URL.Query()
	verb := "list"
	switch {
	case one != "":
		verb = "get"
	case query.Get("watch") == "true":
		verb = "watch"
	}
	s.mu.Lock()
	s.requests = append(s.requests, Request{verb, group, resource})
	fault := s.fault
	s.mu.Unlock()
	if fault != nil && fault(w, r) {
		return
	}
	if _, known := resources[resource]; !known || !ok || r.Method != http.MethodGet {
		Refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound, "no such thing here")
		return
	}
	q := &asked{resource: resource, query: query.Get, format: s.format(r.Header.Get("Accept"))}
	var errLabels, errFields error
	q.labels, errLabels = labels.Parse(query.Get("labelSelector"))
	q.fields, errFields = fields.ParseSelector(query.Get("fieldSelector"))
	switch {
	case errLabels != nil || errFields != nil:
		Refuse(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, "a selector cannot be read")
	case verb == "get":
		s.get(w, q, one)
	case verb == "watch":
		s.watch(w, r, q)
	default:
		s.list(w, q)
	}
}

// format is the first that a client accepts.
func (s *Server) format(accept string) runtime.SerializerInfo {
	first, _, _ := strings.Cut(accept, ",")
	for _, want := range []string{first, runtime.ContentTypeJSON} {
		if info, ok := runtime.SerializerInfoForMediaType(s.codecs.SupportedMediaTypes(), want); ok {
			return info
		}
	}
	panic("no JSON")
}

// selects says whether a client wants an object; nil is none.
func (q *asked) selects(o Object) bool {
	if o == nil {
		return false
	}
	has := fields.Set{"metadata.name": o.GetName(), "metadata.namespace": o.GetNamespace()}
	switch o := o.(type) {
	case *corev1.Service:
		has["spec.clusterIP"] = o.Spec.ClusterIP
	case *corev1.Pod:
		has["spec.nodeName"] = o.Spec.NodeName
	}
	return q.labels.Matches(labels.Set(o.GetLabels())) && q.fields.Matches(has)
}

// get answers one object.
func (s *Server) get(w http.ResponseWriter, q *asked, name string) {
	s.mu.Lock()
	found := s.objects[q.resource][name]
	s.mu.Unlock()
	if found == nil {
		Refuse(w, http.StatusNotFound, metav1.StatusReasonNotFound, q.resource+" "+name+" not found")
		return
	}
	w.Header().Set("Content-Type", q.format.MediaType)
	s.encoder(q).Encode(found.DeepCopyObject(), w)
}

// list answers one page. It continues after the name of the last object.
func (s *Server) list(w http.ResponseWriter, q *asked) {
	s.mu.Lock()
	version, after := s.version, ""
	if token := q.query("continue"); token != "" {
		if s.stale {
			s.mu.Unlock()
			Refuse(w, http.StatusGone, metav1.StatusReasonExpired, "the provided continue parameter is too old")
			return
		}
		was, rest, _ := strings.Cut(token, ":")
		version, _ = strconv.ParseUint(was, 10, 64)
		after = rest
	}
	limit, _ := strconv.Atoi(q.query("limit"))
	page, more := s.page(q, after, limit)
	s.mu.Unlock()
	about := metav1.ListMeta{ResourceVersion: strconv.FormatUint(version, 10)}
	if more {
		about.Continue = about.ResourceVersion + ":" + name(page[len(page)-1])
	}
	w.Header().Set("Content-Type", q.format.MediaType)
	s.encoder(q).Encode(listOf(q.resource, page, about), w)
}

// page are the first objects after a name, all for limit 0, and whether there are
// more. It is called with s.mu held.
func (s *Server) page(q *asked, after string, limit int) (page []Object, more bool) {
	of := s.objects[q.resource]
	if s.sorted[q.resource] == nil {
		s.sorted[q.resource] = slices.Sorted(maps.Keys(of))
	}
	names := s.sorted[q.resource]
	i, found := slices.BinarySearch(names, after)
	if found {
		i++
	}
	for _, name := range names[i:] {
		if !q.selects(of[name]) {
			continue
		}
		if limit > 0 && len(page) == limit {
			return page, true
		}
		page = append(page, of[name])
	}
	return page, false
}

func (s *Server) encoder(q *asked) runtime.Encoder {
	gvk := resources[q.resource]
	return s.codecs.EncoderForVersion(q.format.Serializer, schema.GroupVersion{Group: gvk.Group, Version: gvk.Version})
}

func listOf(resource string, page []Object, about metav1.ListMeta) runtime.Object {
	var list runtime.Object
	switch resource {
	case "services":
		list = &corev1.ServiceList{ListMeta: about}
	case "nodes":
		list = &corev1.NodeList{ListMeta: about}
	case "pods":
		list = &corev1.PodList{ListMeta: about}
	case "configmaps":
		list = &corev1.ConfigMapList{ListMeta: about}
	case "deployments":
		list = &appsv1.DeploymentList{ListMeta: about}
	case "endpointslices":
		list = &discoveryv1.EndpointSliceList{ListMeta: about}
	}
	items := make([]runtime.Object, len(page))
	for i, o := range page {
		items[i] = o
	}
	if err := meta.SetList(list, items); err != nil {
		panic(err)
	}
	return list
}

// watch answers with all changes from a version on.
func (s *Server) watch(w http.ResponseWriter, r *http.Request, q *asked) {
	from, err := strconv.ParseUint(q.query("resourceVersion"), 10, 64)
	if err != nil {
		Refuse(w, http.StatusBadRequest, metav1.StatusReasonBadRequest, "a watch needs a resourceVersion here")
		return
	}
	lasts, _ := strconv.Atoi(q.query("timeoutSeconds"))
	over := time.NewTimer(min(grace, time.Duration(max(lasts, 1))*time.Second))
	defer over.Stop()
	_, since := s.news(q.resource, from) // before it is counted: then a cut is seen
	s.mu.Lock()
	s.watches[q.resource]++
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.watches[q.resource]--
	}()
	out := s.stream(w, q)
	for {
		news, at := s.news(q.resource, from)
		if from < at.oldest || at.expiries > since.expiries {
			out.send(watch.Error, &expired)
			return
		}
		for _, c := range news {
			out.change(q, c)
		}
		from = at.version
		if at.bookmarks > since.bookmarks && q.query("allowWatchBookmarks") == "true" {
			out.bookmark(at.version)
		}
		since.bookmarks = at.bookmarks
		switch {
		case at.cuts > since.cuts && at.torn:
			out.half()
		case at.cuts > since.cuts:
			return
		}
		select {
		case <-at.changed:
		case <-over.C:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// moment is what a watch has to know of the server.
type moment struct {
	version, oldest           uint64
	bookmarks, expiries, cuts int
	torn                      bool
	changed                   <-chan struct{}
}

// news are the changes of a resource after a version.
func (s *Server) news(resource string, from uint64) ([]change, moment) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var news []change
	for _, c := range s.history {
		if c.version > from && c.resource == resource {
			news = append(news, c)
		}
	}
	return news, moment{s.version, s.oldest, s.bookmarks, s.expiries, s.cuts, s.torn, s.changed}
}
